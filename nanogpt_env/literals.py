"""The numbers of a candidate file, as a vector: settings that a search, or a policy, can move.

Settings are module-level names (`MUON_LR, ADAM_LR = 0.03, 0.02`) and keyword arguments (`weight_decay=0.1`,
`betas=(0.9, 0.95)`) whose value is a positive number. All else in the file stays as it is.
"""

from __future__ import annotations

import ast
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FACTOR = 4.0
"""what a move of 1 multiplies a number by, and a move of -1 divides it by"""
_NOT_SETTINGS = re.compile(r"(eps|dim|dtype|fused|seed)\b|.*(ROWS|LENGTH)")


@dataclass(frozen=True)
class Literal:
    """One number in a source. `begin`, `end`: where it stands, in characters."""

    name: str
    value: float
    begin: int
    end: int
    whole: bool
    """an integer, which stays one"""

    def moved(self, by: float) -> float:
        """`by` in -1 to 1, further is cut. What lies between 0.5 and 1, as momenta do, moves by its distance to 1."""
        factor: float = FACTOR ** max(-1.0, min(1.0, by))
        if self.whole:
            return max(1, round(self.value * factor))
        if 0.5 <= self.value < 1:
            return 1 - min((1 - self.value) * factor, 0.999)
        return self.value * factor


def find(source: str) -> tuple[Literal, ...]:
    """The settings of a source, in the order of the text. Raises `SyntaxError`."""
    lines = list(io.StringIO(source, newline=""))  # as Python counts them: splitlines() knows more ends
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found: dict[int, Literal] = {}
    for name, node in _numbers(ast.parse(source)):
        if not _NOT_SETTINGS.match(name):
            assert node.end_lineno is not None and node.end_col_offset is not None
            begin, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
            assert isinstance(node.value, (int, float))
            found[begin] = Literal(name, node.value, begin, end, isinstance(node.value, int))
    return tuple(found[begin] for begin in sorted(found))


def _numbers(tree: ast.Module) -> Iterator[tuple[str, ast.Constant]]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            yield from _paired(statement.targets[0], statement.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg:
                    yield from _paired(ast.Name(keyword.arg), keyword.value)


def _paired(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.Constant]]:
    """Names with their numbers, also of tuples."""
    if isinstance(value, ast.Tuple):
        for i, part in enumerate(value.elts):
            inner = target.elts[i] if isinstance(target, ast.Tuple) and i < len(target.elts) else target
            for name, number in _paired(inner, part):
                yield (name if inner is not target else f"{name}[{i}]"), number
    elif isinstance(target, ast.Name) and isinstance(value, ast.Constant) and _is_setting(value.value):
        yield target.id, value


def _is_setting(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def moved(source: str, moves: Sequence[float]) -> str:
    """The source with each setting moved. Raises `ValueError` unless there is a move for each."""
    literals = find(source)
    if len(moves) != len(literals):
        raise ValueError(f"{len(moves)} moves for {len(literals)} settings")
    for literal, by in reversed(list(zip(literals, moves, strict=True))):
        if by:
            source = source[: literal.begin] + f"{literal.moved(by):.6g}" + source[literal.end :]
    return source
