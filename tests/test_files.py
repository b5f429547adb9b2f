"""How files are written: whole or not at all, links kept, leftovers collected, lines never lost."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from file_faults import Faults

import maestro_kernels as mk
from maestro_kernels import files, hardware, tables
from maestro_kernels.files import append_lines, replacing, write_text
from maestro_kernels.measure.records import Journal

PARTIAL = ".maestro-0123456789abcdef.partial"


def test_an_error_in_the_block_leaves_the_old_content(tmp_path):
    write_text(tmp_path / "a", "old")

    def fail():
        with replacing(tmp_path / "a") as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_write_leaves_no_folder_behind(tmp_path):
    def full(number, name, first):
        if name == "write":
            raise OSError(errno.ENOSPC, "no space left")

    with Faults(full), pytest.raises(OSError, match=r"No space left on device: '.*/c'$"):
        write_text(tmp_path / "a" / "b" / "c", "text")
    assert os.listdir(tmp_path) == []


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    for text in ("first, the link leads nowhere", "then to a file"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "file").read_text() == text
    append_lines(tmp_path / "link", ["{}"])
    assert (tmp_path / "link").is_symlink()


def test_permissions_are_those_of_the_umask_or_of_the_file_that_was_there(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "new")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
        (tmp_path / "a").chmod(0o600)
        write_text(tmp_path / "a", "again")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_only_leftovers_of_dead_writers_are_removed(tmp_path):
    (tmp_path / PARTIAL).write_text("of a dead writer")
    (tmp_path / ".maestro-notes.partial").write_text("the user's")
    with replacing(tmp_path / "a") as first:
        first.write(b"first")
        assert not (tmp_path / PARTIAL).exists()
        # A second writer at work at the same time leaves the first one's file alone.
        write_text(tmp_path / "a", "second")
        assert sum(name.endswith(".partial") for name in os.listdir(tmp_path)) == 2
    assert (tmp_path / "a").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == [".maestro-notes.partial", "a"]


def test_a_collector_between_creation_and_lock_is_survived(tmp_path, monkeypatch):
    real, stolen = files.lock, []

    def late(fd, *, wait=False):
        if not stolen:
            (path,) = tmp_path.glob(".maestro-*")
            stolen.append(path)
            path.unlink()
        return real(fd, wait=wait)

    monkeypatch.setattr(files, "lock", late)
    write_text(tmp_path / "a", "text")
    assert stolen
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["folder", "FIFO"])
def test_what_is_no_file_is_not_replaced(kind, tmp_path):
    path = tmp_path / "a"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    for write in (lambda: write_text(path, "x"), lambda: append_lines(path, ["{}"])):
        with pytest.raises(OSError, match=f"got a {kind}: '.*/a'"):
            write()
    assert os.listdir(tmp_path) == ["a"]


def test_names_at_the_limit_and_names_that_are_no_text(tmp_path):
    for name in ("n" * 255, os.fsdecode(b"\xff\xfe"), "ä ü\n?"):
        write_text(tmp_path / name, name if name.isascii() else "text")
        assert (tmp_path / name).is_file()
    assert len(os.listdir(tmp_path)) == 3


def test_lines_of_several_processes_are_all_there_and_whole(tmp_path):
    script = (
        "import sys\nfrom maestro_kernels.files import append_lines\n"
        "for i in range(150): append_lines(sys.argv[1], "
        '[\'{"who": %s, "i": %d, "x": "%s"}\' % (sys.argv[2], i, \'y\' * i * 40)] * 2)'
    )
    path = tmp_path / "deep" / "rows.jsonl"
    env = {**os.environ, "PYTHONPATH": str(Path(mk.__file__).parents[1])}
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(path), str(who)], env=env)
        for who in range(3)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for who in range(3):
        mine = [row["i"] for row in found if row["who"] == who]
        assert mine == [i for i in range(150) for _ in range(2)]


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ('{"a": 1}\n{"b', '{"a": 1}\n'),
        ('{"a": 1}\n{"b": 2}', '{"a": 1}\n{"b": 2}\n'),
        ("{", ""),
        ("", ""),
        ('{"a": "' + "x" * 200_000, ""),
    ],
)
def test_a_line_that_was_cut_off_is_removed_and_a_whole_one_kept(before, kept, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(before)
    append_lines(path, ['{"c": 3}'])
    assert path.read_text() == kept + '{"c": 3}\n'


def test_a_full_disk_leaves_the_lines_that_were_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_lines(path, ['{"a": 1}'])

    def full(number, name, first):
        if name == "write":
            os.pwrite(first, b'{"half', os.fstat(first).st_size)
            raise OSError(errno.ENOSPC, "no space left")

    with Faults(full), pytest.raises(OSError, match="No space left"):
        append_lines(path, ['{"b": 2}'])
    assert path.read_text() == '{"a": 1}\n'


def test_a_writer_that_waited_for_a_file_that_was_replaced_takes_the_new_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_lines(path, ['{"a": 1}'])
    with files.locked_file(path):
        waiting = threading.Thread(target=append_lines, args=(path, ['{"b": 2}']))
        waiting.start()
        time.sleep(0.05)
        write_text(path, '{"new": 1}\n')
    waiting.join()
    assert path.read_text() == '{"new": 1}\n{"b": 2}\n'


def test_one_folder_for_all_that_the_package_writes_by_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("MAESTRO_KERNELS_TABLE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    device = hardware.current_device("cpu")
    monkeypatch.delenv("MAESTRO_KERNELS_CACHE", raising=False)
    assert tables.user_path(device).parent == tmp_path / "config" / "maestro_kernels"
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path / "cache"))
    assert tables.user_path(device).parent == tmp_path / "cache"


def test_a_user_without_a_home_has_a_place_too(monkeypatch):
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MAESTRO_KERNELS_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert files.cache_folder() == files.config_folder()
    assert str(os.getuid()) in files.cache_folder().name


def test_a_journal_that_cannot_be_kept_says_so_and_works(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="measurements are not kept: .*MAESTRO_KERNELS_CACHE"):
        journal = Journal("profiles", {"device": "a"}, lambda record: record)
    journal.finish("part")
    assert journal.done == {"part"}


def test_two_journals_of_one_identity_keep_what_both_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MAESTRO_KERNELS_CACHE", str(tmp_path))
    first, second = (Journal("profiles", {"a": 1}, lambda record: record) for _ in range(2))
    first.finish("one")
    second.finish("two")
    first.path.unlink()
    first.finish("three")
    second.finish("four")
    assert Journal("profiles", {"a": 1}, lambda record: record).done == {"three", "four"}
