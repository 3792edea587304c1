"""The episode's append-only record: one JSON object a line, from which every score can be recomputed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import Any

from nanogpt_env.errors import LedgerError

VERSION = 5
# what must survive a crash of the machine, not only of the process, before anybody acts on it
_SYNCED = frozenset({"episode", "charge", "rerun", "verdict", "reward", "end"})


class Ledger:
    """Writes lines; opening an existing file continues it. A torn last line is cut off and reported in
    `recovered`. Raises `LedgerError` when the file cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recovered = ""
        self.lines = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if path.exists():
                lines, self.recovered = read_ledger(path)
                self.lines = len(lines)
                if self.recovered:
                    _cut_torn_line(path)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise LedgerError(f"cannot write {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except OSError:
            os.close(self._fd)
            raise LedgerError(f"{path} is being written by another environment") from None

    def append(self, kind: str, **fields: Any) -> None:
        """Write one line, in one piece."""
        line = json.dumps({"seq": self.lines, "kind": kind, **fields}, allow_nan=False, default=str)
        data = line.encode() + b"\n"
        size = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError(28, "no space left on device")
            if kind in _SYNCED:
                os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)  # what a torn line would make of the next one is no line
            raise LedgerError(f"cannot write {self.path}: {error.strerror}; the line {kind!r} is lost") from None
        self.lines += 1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_whole(path: Path, text: str) -> None:
    """Replace a file, or leave it as it was. Raises `LedgerError`."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # no name that somebody can lay a link at
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise LedgerError(f"cannot write {path}: {error.strerror}") from None


def read_ledger(path: Path) -> tuple[list[dict[str, Any]], str]:
    """(lines, what was recovered from). A last line without its newline was torn by a crash and is left
    out. Raises `LedgerError` for any other damage, naming the line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"cannot read {path}: {error.strerror}") from None
    whole, newline, torn = data.rpartition(b"\n")
    recovered = f"a torn last line of {len(torn)} bytes was left out" if torn else ""
    lines = []
    for number, raw in enumerate(whole.split(b"\n") if newline else [], 1):
        try:
            line = json.loads(raw)
            if line["seq"] != number - 1 or not isinstance(line["kind"], str):
                raise ValueError("line numbers do not follow each other")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LedgerError(f"{path} line {number} is damaged: {error}") from None
        lines.append(line)
    return lines, recovered


def _cut_torn_line(path: Path) -> None:
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(data.rfind(b"\n") + 1)
