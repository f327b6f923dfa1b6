"""The rule of all that is written: nothing of others is replaced, files are whole or as they were, one process writes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from learnevict.errors import DataError, UsageError, told_in_one_line
from learnevict.files import MARKDOWN, Lines, check, check_folder, locked, replacing, replacing_folder, special, write

MARK = b'{"id": "'
KIND = (("a.json", "b.json"), "a.json", b'"made": ')


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_others_wrote_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("# notes\n")
    with pytest.raises(DataError, match=r"was not written by this program; choose another --out$"):
        check(path, MARKDOWN)
    with pytest.raises(DataError, match=r"choose another --out, or replace it with --overwrite$"):
        write(path, "", MARKDOWN, overwrite=False)
    assert path.read_text() == "# notes\n"
    write(path, "<!-- Written by learnevict report. -->", MARKDOWN, overwrite=True)
    write(path, "<!-- Written by learnevict report. --> again", MARKDOWN)
    assert path.read_text().endswith("again")
    (tmp_path / "empty").touch()
    write(tmp_path / "empty", "x", MARKDOWN)
    for path in (tmp_path, tmp_path / "no" / "where"):
        with pytest.raises(DataError, match=r"cannot write .*; choose another --out"):
            check(path, MARKDOWN)
    assert listing(tmp_path) == ["empty", "table.md"]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path, link = tmp_path / "page", tmp_path / "link"
    write(path, '{"id": "old', MARK)
    path.chmod(0o640)
    link.symlink_to(path)
    with pytest.raises(ZeroDivisionError), replacing(path, MARK) as fresh:
        assert fresh.write_text("half") / 0
    assert path.read_text() == '{"id": "old' and listing(tmp_path) == ["link", "page"]
    write(link, '{"id": "new', MARK)
    assert link.is_symlink() and path.read_text() == '{"id": "new' and path.stat().st_mode & 0o777 == 0o640


def test_devices_and_pipes_are_written_to_as_they_are(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for path in (fifo, Path("/dev/null"), Path("/dev/stdout"), Path("/dev/fd/1")):
        assert special(path)
        check(path, MARK)
    write(fifo, "said", MARK)
    Lines(fifo, MARK).append({"id": "a"})
    assert os.read(reader, 100) == b'said{"id": "a"}\n'
    os.close(reader)
    write(Path("/dev/null"), "x", MARK)
    for action in (lambda: write(Path("/dev/full"), "x", MARK), lambda: Lines(Path("/dev/full"), MARK).append(1)):
        with pytest.raises(DataError, match="cannot write '/dev/full': No space left on device; free some space"):
            action()
    assert listing(tmp_path) == ["fifo"]


@pytest.mark.parametrize(
    "kind", [lambda said: OSError(errno.ENOSPC, said), lambda said: RuntimeError(f"I/O error: {said}")]
)
def test_on_a_full_disk_programs_ask_for_space(kind, capsys):
    """An OSError without a file's name, as write() raises it, and what safetensors makes of one."""
    with pytest.raises(SystemExit), told_in_one_line("go on"):
        raise kind("No space left on device")
    assert capsys.readouterr().err.endswith("No space left on device; free some space, then run it again\n")


@pytest.mark.parametrize(
    "text", ["roses\n", '{"a": 1}\n{"id": "b"}\n', '{"id": "a"}\nmy notes', '{"id": "a"}\n[' + "[" * 99999, "["]
)
def test_lines_of_others_are_refused_and_left(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="was not written by this program"):
        Lines(path, MARK)
    assert path.read_text() == text


@pytest.mark.parametrize("tail", ["", "{", '{"id": "hal', '{"id": "b"}'])
def test_a_line_that_was_being_written_goes_when_the_next_one_comes(tmp_path, tail):
    path, whole = tmp_path / "rows.jsonl", '{"id": "a"}\n'
    path.write_text(whole + tail)
    kept = ["a", "b"] if tail.endswith("}") else ["a"]
    lines = Lines(path, MARK)
    assert [row["id"] for row in lines.rows] == kept and path.read_text() == whole + tail, (
        "reading has changed the file"
    )
    lines.append({"id": "é"})
    lines.append({"id": "\ud800"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [*kept, "é", "\ud800"]


def test_one_process_writes(tmp_path):
    path, code = (
        tmp_path / "rows.jsonl",
        (
            "import sys; from pathlib import Path; from learnevict.files import locked\n"
            "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
        ),
    )
    for name in (path, tmp_path):
        command = [sys.executable, "-c", code, str(name)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(
                UsageError, match=f'another process is writing .*"pid": {other.pid}, "host": .*wait for it'
            ):
                locked(name).__enter__()
            other.send_signal(signal.SIGKILL)
        assert len(listing(tmp_path)) == 1, "a killed process leaves its lock"
        with locked(name):
            assert f'"pid": {os.getpid()},' in next(tmp_path.iterdir()).read_text()
            with pytest.raises(UsageError, match="another process"):
                locked(name).__enter__()
        assert listing(tmp_path) == []
    with locked(None), locked(Path("/dev/null")):
        pass
    mine = tmp_path / "rows.jsonl.lock"
    mine.write_text("mine")
    with pytest.raises(DataError, match="is no lock of this program"):
        locked(path).__enter__()
    assert mine.read_text() == "mine"


def test_a_folder_is_replaced_as_a_whole_and_only_by_its_own_kind(tmp_path):
    folder = tmp_path / "made"
    for text in ("1", "2"):
        with replacing_folder(folder, *KIND) as fresh:
            (fresh / "a.json").write_text(f'{{"made": {text}}}')
    (fresh / "b.json").parent.mkdir()
    with pytest.raises(ZeroDivisionError), replacing_folder(folder, *KIND) as fresh:
        assert (fresh / "a.json").write_text('{"made": 3}') / 0
    assert (folder / "a.json").read_text() == '{"made": 2}'
    folder.rename(folder.with_name(".made.learnevict-old"))  # killed between the two renamings
    check_folder(folder, *KIND)
    assert (folder / "a.json").read_text() == '{"made": 3}'
    for name, text in (("notes.txt", ""), ("b.json/deep", "")):
        strange = folder / name
        strange.parent.mkdir(exist_ok=True)
        strange.write_text(text)
        with pytest.raises(
            DataError, match=rf"holds {strange.relative_to(folder).parts[0]}, not written by this program"
        ):
            check_folder(folder, *KIND)
        strange.unlink()
    strange.parent.rmdir()
    for name in (".", "..", "/"):
        with pytest.raises(DataError, match="is the folder you are in, or holds it"):
            check_folder(Path(name), *KIND)
    (folder / "a.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds a\.json, not written"), replacing_folder(folder, *KIND):
        pass
