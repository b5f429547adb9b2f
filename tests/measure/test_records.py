"""The store of records: what is read, what is refused, what is checked."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from maestro_kernels.measure import records


@dataclass(frozen=True)
class One:
    """A field of every kind that is kept."""

    text: str
    number: int
    share: float
    maybe: float | None
    flag: bool
    size: tuple[int, ...]
    times: dict[str, tuple[float, float]]
    kind: Literal["a", "b"]
    extra: dict[str, Any]


ONE = One("ä\u2028", 1, 0.5, None, True, (1, 2), {"x": (1.0, 2)}, "a", {"k": [1]})


def test_a_dataclass_survives_the_file(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    records.append(path, [dataclasses.asdict(ONE)])
    records.append(path, [{"schema": 1}])
    first, second = records.load(path)
    assert records.checked(One, first, "here") == ONE
    assert second == {"schema": 1}
    ((where, _),) = records.located(path)[1:]
    assert where == "load: rows.jsonl, line 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": 1}, "text: expected str, got 1"),
        ({"number": 1.0}, "number: expected int, got 1.0"),
        ({"number": True}, "number: expected int, got True"),
        ({"share": "1"}, "share: expected float, got '1'"),
        ({"share": False}, "share: expected float, got False"),
        ({"maybe": "x"}, r"maybe: expected float \| None, got 'x'"),
        ({"flag": 1}, "flag: expected bool, got 1"),
        ({"size": 3}, r"size: expected tuple\[int, ...\], got 3"),
        ({"size": [1, "2"]}, "size: expected tuple"),
        ({"times": {"x": [1.0]}}, "times: expected dict"),
        ({"times": [1.0]}, "times: expected dict"),
        ({"kind": "c"}, r"kind: expected one of \('a', 'b'\), got 'c'"),
        ({"kind": []}, "kind: expected one of"),
        ({"other": 1}, r"expected the fields .* missing \[\], unknown \['other'\]"),
    ],
)
def test_a_field_of_another_kind_is_named(change, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        records.checked(One, {**dataclasses.asdict(ONE), **change}, "here")


def test_a_record_that_is_none_or_lacks_a_field_is_refused():
    with pytest.raises(ValueError, match=r"missing \['extra', .*\], unknown \[\]"):
        records.checked(One, [], "here")
    found = dataclasses.asdict(ONE)
    del found["flag"]
    with pytest.raises(ValueError, match=r"missing \['flag'\]"):
        records.checked(One, found, "here")


@pytest.mark.parametrize("torn", ['{"b": 2', '{"b": "\N{EN DASH}'.encode()[:-1], "1"[:0]])
def test_a_last_line_that_was_cut_off_is_passed_over(torn, tmp_path):
    path = tmp_path / "rows.jsonl"
    tail = torn if isinstance(torn, bytes) else torn.encode()
    path.write_bytes(b'{"a": 1}\n\n' + tail)
    assert records.load(path) == [{"a": 1}]
    records.append(path, [{"c": 3}])
    assert records.load(path) == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1\n{"b": 2}\n', r"line 1: expected a JSON object, got '{\"a\": 1'"),
        ('{"a": 1}\n[1]\n', "line 2: expected a JSON object, got list"),
        ('{"a": 1}\n7', "line 2: expected a JSON object, got int"),
        ('{"schema": 1}\n{"schema": 2}\n', "line 2: schema: expected 1, got 2"),
        ('{"a": 1}\n', "line 1: schema: expected 1, got None"),
    ],
)
def test_another_line_that_is_no_record_is_named(text, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^train: rows.jsonl, {message}"):
        records.load(path, schema=1 if "schema" in message else None, fn="train")


def test_a_document_holds_a_record_a_line(tmp_path):
    path = tmp_path / "table.json"
    rows = [{"M": 1}, {"M": 2}]
    path.write_text(records.document({"schema": 3, "name": "x"}, "rows", rows))
    assert {'  {"M": 1},', '  {"M": 2}'} <= set(path.read_text().splitlines())
    read = {"schema": 3, "what": "table", "fn": "load"}
    assert records.load_document(path, ("name", "rows"), **read) == {"name": "x", "rows": rows}
    for text, message in (
        ("[", "table.json: expected a JSON table, got"),
        ("[1]", "table.json: expected a JSON table, got list"),
        ("[" * 100_000, "table.json: expected a JSON table, got"),
        ('{"schema": 4}', "table.json: schema: expected 3, got 4"),
        ('{"name": 1, "rows": 2}', r"expected the fields \['name', 'rows', 'schema'\] of a table"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^load: {message}|{message}"):
            records.load_document(path, ("name", "rows"), **read)


def test_what_no_json_has_is_refused_before_the_file_is_touched(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="JSON compliant"):
        records.append(path, [{"a": 1.0}, {"a": float("nan")}])
    assert not path.exists()


def test_a_log_goes_on_after_what_it_was_told_to_keep(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = records.Log(path)
    log.append(event="start")
    kept = log.sync()
    log.append(event="step", loss=1.0)
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append(event="step", loss=float("inf"))
    log.close()
    assert kept == len('{"event": "start"}\n')
    assert [r["event"] for r in records.load(path)] == ["start", "step"]
    log = records.Log(path, kept)
    log.append(event="epoch")
    log.close()
    assert [r["event"] for r in map(json.loads, path.read_text().splitlines())] == [
        "start",
        "epoch",
    ]
    with pytest.raises(ValueError, match=r"train: metrics.jsonl: expected at least the 999 bytes"):
        records.Log(path, 999, fn="train")
    records.Log(path).close()
    assert path.read_bytes() == b""


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    records.write(path, [{"a": 1}, {"b": "é"}])
    assert records.load(path) == [{"a": 1}, {"b": "é"}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write(path, [{"a": 2}, {"a": float("nan")}])
    assert records.load(path) == [{"a": 1}, {"b": "é"}]
