"""How a program is shown to a model: as data, whole, and provably what runs.

Each line of the sources is one line of the text, JSON-encoded, so that nothing in it can end the text, hide or look
like anything else; empty lines are left out, which the numbers tell. Comments, which do not run, are shown apart.
Sources so long that a model could not read them at once are shown in parts that overlap.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nanogpt_env.errors import JudgeError
from nanogpt_env.judging import Material
from nanogpt_env.workspace import apart, same_program

PART_CHARACTERS = 400_000
"""more than 128 KiB of ordinary code need"""
OVERLAP_CHARACTERS = 8_000


@dataclass(frozen=True)
class Line:
    """Of a file: ` ` as in the start record, `+` new, `-` only there, `#` a comment. A long one comes in pieces."""

    file: str
    number: int
    mark: str
    text: str

    def shown(self) -> str:
        return f"{self.number} {self.mark} {json.dumps(self.text)}"


@dataclass(frozen=True)
class Shown:
    """A program as a model is shown it."""

    parts: tuple[tuple[str, ...], ...]
    """lines of text"""
    lines: Mapping[str, int]
    """file -> how many lines it has: what a finding may name"""


def show(material: Material, part: int = PART_CHARACTERS, overlap: int = OVERLAP_CHARACTERS) -> Shown:
    """Raises `JudgeError` if what would be shown is not what runs."""
    lines: list[Line] = []
    for name, source in material.sources.items():
        try:
            lines += _lines(name, material.start.get(name, ""), source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise JudgeError(f"{name} cannot be shown to a judge: {error}") from None
    counts = {name: source.count("\n") + 1 for name, source in material.sources.items()}
    whole = [piece for line in lines if line.text for piece in _pieces(line, overlap // 4)]
    return Shown(tuple(_parts(whole, part, overlap)), counts)


def _lines(name: str, before: str, after: str) -> list[Line]:
    """The whole file with its changes marked, then its comments."""
    old, _ = apart(before, name)
    new, comments = apart(after, name)
    found: list[Line] = []
    for what, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what == "equal":
            found += (Line(name, n + 1, " ", new[n]) for n in range(k, m))
            continue
        found += (Line(name, n + 1, "-", old[n]) for n in range(i, j))
        found += (Line(name, n + 1, "+", new[n]) for n in range(k, m))
    kept = [line.text for line in found if line.mark in " -"]
    result = "\n".join(line.text for line in found if line.mark in " +")
    if kept != old or not same_program(result, after, name):
        raise JudgeError(f"{name} cannot be shown to a judge as it runs")
    return found + [Line(name, number, "#", text) for number, text in comments]


def _pieces(line: Line, size: int) -> Iterator[Line]:
    """None longer than `size` when shown, so that several fit into an overlap; they overlap themselves."""
    if len(json.dumps(line.text)) <= size:
        yield line
        return
    step = size // 24  # a character may be shown as twelve
    for begin in range(0, max(1, len(line.text) - step), step):
        yield Line(line.file, line.number, line.mark, line.text[begin : begin + 2 * step])


def _parts(lines: list[Line], size: int, overlap: int) -> Iterator[tuple[str, ...]]:
    """Each of at most `size` characters, or of one line; each begins with the last `overlap` of the one before."""
    part: list[Line] = []
    length = 0
    for line in lines:
        if part and length + len(line.shown()) > size:
            yield _text(part)
            part = _tail(part, overlap)
            length = sum(len(kept.shown()) + 1 for kept in part)
        part.append(line)
        length += len(line.shown()) + 1
    yield _text(part)


def _text(part: list[Line]) -> tuple[str, ...]:
    """With a line that names the file wherever another one begins."""
    text: list[str] = []
    file = ""
    for line in part:
        if line.file != file:
            file = line.file
            text.append(f"FILE {json.dumps(file)}")
        text.append(line.shown())
    return tuple(text)


def _tail(part: list[Line], overlap: int) -> list[Line]:
    kept: list[Line] = []
    length = 0
    for line in reversed(part):
        length += len(line.shown()) + 1
        if length >= overlap:
            break
        kept.insert(0, line)
    return kept
