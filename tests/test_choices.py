"""What was measured at first use: where it is kept, for whom, and what damages it survives."""

import json
import os
import warnings

import pytest
from first_use_support import NATIVE, measuring  # noqa: F401 - a fixture

from maestro_kernels import choices, hardware
from maestro_kernels.choices import Measured
from maestro_kernels.tables import BASELINE

FOUND = Measured("some kind", {BASELINE: 10.0, NATIVE: 4.0})


def device():
    return hardware.current_device("cpu")


def files(folder):
    return list((folder / "first-use").glob("*.jsonl"))


def test_the_winner_is_the_fastest_by_a_margin():
    assert FOUND.winner == NATIVE
    assert Measured("", {BASELINE: 10.0, NATIVE: 9.9}).winner == BASELINE
    assert Measured("", {BASELINE: 10.0, NATIVE: 10.0, "triton: row": 3.0}).winner == "triton: row"
    assert "2.50 times as fast as two matmuls" in str(FOUND)


def test_a_later_process_starts_with_what_was_measured(measuring):  # noqa: F811
    choices.remember(FOUND, device())
    choices.forget()
    assert choices.find("some kind", device()) == FOUND
    assert choices.find("another", device()) is None
    assert len(files(measuring)) == 1


def test_what_is_not_to_be_kept_lives_as_long_as_the_process(measuring):  # noqa: F811
    choices.remember(FOUND, device(), keep=False)
    assert choices.find("some kind", device()) == FOUND
    choices.forget()
    assert choices.find("some kind", device()) is None


def test_other_software_is_measured_anew(measuring, monkeypatch):  # noqa: F811
    choices.remember(FOUND, device())
    choices.forget()
    monkeypatch.setattr(hardware, "libraries", lambda: {"torch": "9.9"})
    assert choices.find("some kind", device()) is None


@pytest.mark.parametrize("damage", ["", "nonsense\n", '{"item": {"bucket": 3, "us": {}}}\n'])
def test_a_damaged_file_is_begun_again(measuring, damage):  # noqa: F811
    choices.remember(FOUND, device())
    [path] = files(measuring)
    path.write_text(path.read_text().splitlines(keepends=True)[0] + damage)
    choices.forget()
    assert choices.find("some kind", device()) is None
    choices.remember(FOUND, device())
    choices.forget()
    assert choices.find("some kind", device()) == FOUND


def test_a_last_line_cut_short_costs_itself_only(measuring):  # noqa: F811
    choices.remember(FOUND, device())
    [path] = files(measuring)
    with path.open("a") as file:
        file.write('{"item": {"bu')
    choices.forget()
    assert choices.find("some kind", device()) == FOUND


def test_a_folder_that_cannot_be_written_is_no_matter(measuring, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    choices.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices.remember(FOUND, device())
        assert choices.find("some kind", device()) == FOUND


def test_a_disk_that_fills_up_is_no_matter(measuring):  # noqa: F811
    assert choices.find("some kind", device()) is None
    [path] = files(measuring)
    path.unlink()
    os.mkfifo(path)  # refused as no file
    choices.remember(FOUND, device())
    assert choices.find("some kind", device()) == FOUND


def test_records_say_what_is_wrong_with_them(measuring):  # noqa: F811
    choices.remember(FOUND, device())
    [record] = choices.export([FOUND.bucket, "unknown"], device())
    assert choices.parse([json.loads(json.dumps(record))], "here") == [FOUND]
    for wrong, message in (
        (
            {**record, "us": {NATIVE: 1.0}},
            r"here\[0\]: us: expected times of 'matmul: two matmuls'",
        ),
        ({**record, "us": {BASELINE: -1.0}}, r"here\[0\]: us: expected"),
        ({"us": record["us"]}, r"here\[0\]: expected the fields"),
        (3, r"here\[0\]: expected the fields"),
    ):
        with pytest.raises(ValueError, match=message):
            choices.parse([wrong], "here")
