"""How a program is shown to a model: as data, whole, and provably what runs.

Each line of the sources is one line of the text, JSON-encoded, so that nothing in it can end the text, hide or look
like anything else. Comments, which do not run, are shown apart. Long sources are shown in parts that overlap.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nanogpt_env.errors import JudgeError
from nanogpt_env.judging import Material
from nanogpt_env.workspace import parse_source

PART_CHARACTERS = 60_000
OVERLAP_CHARACTERS = 4_000


@dataclass(frozen=True)
class Line:
    """Of a file: ` ` as in the start record, `+` new, `-` only there, `#` a comment. A long one comes in pieces."""

    file: str
    number: int
    mark: str
    text: str

    def shown(self) -> str:
        return f"{self.file}:{self.number} {self.mark} {json.dumps(self.text)}"


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
        lines += _lines(name, material.start.get(name, ""), source)
    counts = {name: len(_split(source)) for name, source in material.sources.items()}
    return Shown(tuple(_parts([line for long in lines for line in _pieces(long, overlap)], part, overlap)), counts)


def _lines(name: str, before: str, after: str) -> list[Line]:
    """The whole file with its changes marked, then its comments."""
    old, _ = _apart(before, name)
    new, comments = _apart(after, name)
    found: list[Line] = []
    for what, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what == "equal":
            found += (Line(name, n + 1, " ", new[n]) for n in range(k, m))
            continue
        found += (Line(name, n + 1, "-", old[n]) for n in range(i, j))
        found += (Line(name, n + 1, "+", new[n]) for n in range(k, m))
    _prove(name, found, old, after)
    return found + [Line(name, number, "#", text) for number, text in comments]


def _prove(name: str, shown: list[Line], old: list[str], source: str) -> None:
    """What is shown, read as a diff of the start record, gives a program whose syntax tree is that of the source."""
    kept = [line.text for line in shown if line.mark in " -"]
    result = "\n".join(line.text for line in shown if line.mark in " +")
    if kept != old or ast.dump(parse_source(result, name)) != ast.dump(parse_source(source, name)):
        raise JudgeError(f"{name} cannot be shown to a judge as it runs")


def _apart(source: str, name: str) -> tuple[list[str], list[tuple[int, str]]]:
    """(lines without comments, comments with their line numbers)."""
    lines = _split(source)
    comments = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                comments.append((row, token.string))
                lines[row - 1] = lines[row - 1][:column].rstrip()
    except (tokenize.TokenError, SyntaxError, IndexError) as error:
        raise JudgeError(f"{name} cannot be read line by line: {error}") from None
    return lines, comments


def _split(source: str) -> list[str]:
    """As Python counts lines, which knows fewer line ends than `str.splitlines`."""
    return source.replace("\r\n", "\n").replace("\r", "\n").split("\n") if source else []


def _pieces(line: Line, size: int) -> Iterator[Line]:
    """So short that several fit into an overlap; they overlap themselves."""
    step = size // 8
    if len(line.text) <= 2 * step:
        yield line
        return
    for begin in range(0, len(line.text) - step, step):
        yield Line(line.file, line.number, line.mark, line.text[begin : begin + 2 * step])


def _parts(lines: list[Line], size: int, overlap: int) -> Iterator[tuple[str, ...]]:
    """Each of at most `size` characters, or of one line; each begins with the last `overlap` of the one before."""
    part: list[str] = []
    length, fresh = 0, False
    for line in lines:
        text = line.shown()
        if fresh and length + len(text) > size:
            yield tuple(part)
            part, length = _tail(part, overlap)
            fresh = False
        part.append(text)
        length += len(text) + 1
        fresh = True
    if fresh or not lines:
        yield tuple(part)


def _tail(part: list[str], overlap: int) -> tuple[list[str], int]:
    kept: list[str] = []
    length = 0
    for text in reversed(part):
        if length + len(text) >= overlap:
            break
        kept.insert(0, text)
        length += len(text) + 1
    return kept, length
