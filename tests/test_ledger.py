"""The ledger survives crashes, full disks and damage, or says which line does not."""

import errno
import json
import os
import resource
import stat
import subprocess
import sys

import pytest

from nanogpt_env.errors import LedgerError
from nanogpt_env.ledger import Ledger, read_ledger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "episode" / "ledger.jsonl"


@pytest.fixture
def ledger(path):
    """Three lines."""
    ledger = Ledger(path)
    ledger.append("episode", version=1)
    ledger.append("run", loss=4.25, name="ü\n\u2028")
    ledger.append("end")
    yield ledger
    ledger.close()


def kinds(path):
    lines, _ = read_ledger(path)
    assert [line["seq"] for line in lines] == list(range(len(lines)))
    return [line["kind"] for line in lines]


def test_what_is_written_is_what_is_read(ledger, path):
    lines, recovered = read_ledger(path)
    assert recovered == ""
    assert lines == [
        {"seq": 0, "kind": "episode", "version": 1},
        {"seq": 1, "kind": "run", "loss": 4.25, "name": "ü\n\u2028"},
        {"seq": 2, "kind": "end"},
    ]
    assert path.read_bytes().count(b"\n") == 3


def test_it_is_the_operators_alone(ledger, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_opening_again_continues(ledger, path):
    ledger.close()
    ledger.close()
    again = Ledger(path)
    assert (again.lines, again.recovered) == (3, "")
    again.append("note")
    again.close()
    assert kinds(path) == ["episode", "run", "end", "note"]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_cut_and_reported(ledger, path, cut):
    ledger.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    lines, recovered = read_ledger(path)
    assert len(lines) == 2
    assert "torn" in recovered
    again = Ledger(path)
    assert again.recovered == recovered
    again.append("note")
    again.close()
    assert kinds(path) == ["episode", "run", "note"]
    assert read_ledger(path)[1] == ""


@pytest.mark.parametrize("torn", [b"{", b"\0" * 4096, b"\xff\xfe", b'{"seq": 3, "kind": "note"}'])
def test_any_tail_without_newline_is_torn(ledger, path, torn):
    ledger.close()
    with path.open("ab") as file:
        file.write(torn)
    assert str(len(torn)) in read_ledger(path)[1]
    assert Ledger(path).lines == 3


def test_a_first_line_that_is_torn_leaves_an_empty_ledger(path):
    path.parent.mkdir()
    path.write_bytes(b'{"seq": 0, "ki')
    ledger = Ledger(path)
    assert ledger.lines == 0
    ledger.append("episode")
    ledger.close()
    assert kinds(path) == ["episode"]


def test_an_empty_file_has_no_lines(path):
    path.parent.mkdir()
    path.write_bytes(b"")
    assert read_ledger(path) == ([], "")


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"5", b"null", b"[]", b'"text"', b"{}", b'{"seq": 1}', b'{"kind": "run"}', b'{"seq": 1, "kind": 5}',
     b'{"seq": 0, "kind": "run"}', b'{"seq": 2, "kind": "run"}', b'{"seq": "1", "kind": "run"}', b"\0\0\0",
     b"\xff\xfe\xfd", b'{"seq": 1, "kind": "run"} {}', b"[" * 100_000, b'{"seq": ' + b"9" * 5000 + b"}"],
    ids=lambda damage: repr(damage[:20]),
)  # fmt: skip
def test_damage_in_the_middle_is_refused_with_its_line(ledger, path, damage):
    ledger.close()
    first, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + b"\n" + last)
    with pytest.raises(LedgerError, match="line 2 is damaged"):
        read_ledger(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="line 2 is damaged"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_missing_line_is_damage(ledger, path):
    ledger.close()
    first, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + last)
    with pytest.raises(LedgerError, match="line 2"):
        read_ledger(path)


def test_a_lone_newline_is_damage(path):
    path.parent.mkdir()
    path.write_bytes(b"\n")
    with pytest.raises(LedgerError, match="line 1"):
        read_ledger(path)


def test_not_there(tmp_path):
    with pytest.raises(LedgerError, match="cannot read"):
        read_ledger(tmp_path / "none.jsonl")
    with pytest.raises(LedgerError, match="cannot read"):
        read_ledger(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot write"):
        Ledger(tmp_path / "file" / "ledger.jsonl")


@pytest.mark.parametrize("kind", ["run", "verdict"])
def test_a_write_cut_short_is_an_error_and_leaves_no_trace(ledger, path, monkeypatch, kind):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    with pytest.raises(LedgerError, match=f"no space.*'{kind}' is lost"):
        ledger.append(kind, big="x" * 1000)
    monkeypatch.undo()
    assert kinds(path) == ["episode", "run", "end"]
    ledger.append("note")
    assert kinds(path) == ["episode", "run", "end", "note"]


def test_a_line_that_may_not_be_on_disk_is_no_line(ledger, path, monkeypatch):
    """Or the next one would have its number."""

    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LedgerError, match="Input/output"):
        ledger.append("verdict")
    monkeypatch.undo()
    ledger.append("verdict")
    assert kinds(path) == ["episode", "run", "end", "verdict"]


def test_only_what_somebody_acts_on_is_synced(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    ledger = Ledger(path)
    for kind in ("episode", "action", "reserve", "charge", "rerun", "verdict", "reward", "end"):
        ledger.append(kind)
    ledger.close()
    assert len(synced) == 6


FILL = """
import resource, sys
from pathlib import Path
from nanogpt_env.errors import LedgerError
from nanogpt_env.ledger import Ledger, read_ledger
path = Path(sys.argv[1])
ledger = Ledger(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
errors = 0
for i in range(100):
    try:
        ledger.append("verdict" if i % 2 else "action", text="x" * (i % 90))
    except LedgerError:
        errors += 1
lines = len(read_ledger(path)[0])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.append("end")
print(errors, lines)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limit here")
def test_a_full_disk(path):
    """The kernel takes part of a line and then none. Room again: the ledger goes on."""
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, check=True)
    errors, lines = map(int, done.stdout.split())
    assert errors > 10
    assert lines == 100 - errors > 10
    assert kinds(path)[-1] == "end"
    assert len(kinds(path)) == lines + 1
    assert read_ledger(path)[1] == ""


def test_values_without_a_json_form(ledger, path):
    ledger.append("note", where=path)
    assert json.loads(path.read_text().splitlines()[-1])["where"] == str(path)
