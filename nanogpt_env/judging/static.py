"""The static judge: syntax, imports, calls and literals of a candidate's files. Rules in judges/static."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import tokenize
import tomllib
import zlib
from collections.abc import Iterator
from typing import Literal

from nanogpt_env.content import content_root
from nanogpt_env.judging import Material
from nanogpt_env.types import Finding, Opinion, Record
from nanogpt_env.workspace import parse_source


class FileRules(Record):
    """What holds for one kind of file, beside the rules for all."""

    imports: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """functions that it must define"""


class Rules(Record):
    """`judges/static/judge.toml`."""

    kind: Literal["static"]
    imports: tuple[str, ...]
    files: dict[str, FileRules]
    denied_imports: tuple[str, ...]
    denied_calls: tuple[str, ...]
    max_text_literal: int
    max_row: int
    max_digits: int
    max_depth: int
    incompressible_from: int
    incompressible_ratio: float


@functools.cache
def static_rules() -> Rules:
    text = (content_root() / "judges" / "static" / "judge.toml").read_text(encoding="utf-8")
    return Rules(**tomllib.loads(text))


def judge_source(source: str, name: str, rules: Rules | None = None) -> list[str]:
    """Reasons to refuse the file `name`, each with its line; empty if there are none. Runs no code."""
    return [f"line {line}: {reason}" for line, reason in find_breaks(source, name, rules)]


class StaticJudge:
    """As a judge among others."""

    name = "static"

    def rules(self, material: Material) -> None:
        return None

    def judge(self, material: Material) -> Opinion:
        found = [
            Finding(rule=self.name, file=name, line=line, why=reason)
            for name, source in material.sources.items()
            for line, reason in find_breaks(source, name)
        ]
        return Opinion(judge=self.name, outcome="break" if found else "pass", findings=tuple(found))


def find_breaks(source: str, name: str, rules: Rules | None = None) -> list[tuple[int, str]]:
    """(line, reason) of all that the rules refuse."""
    rules = rules or static_rules()
    try:
        # the grammar first: a warning about a literal is no reason to refuse
        tree = parse_source(source, name)
    except SyntaxError as error:
        return [(error.lineno or 1, f"{error.msg} (column {error.offset or 1})")]
    except (ValueError, RecursionError, MemoryError) as error:
        return [(1, f"cannot be parsed: {str(error) or type(error).__name__}")]
    nodes: list[ast.AST] = []
    level: list[ast.AST] = [tree]
    for _ in range(rules.max_depth):
        nodes += level
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        line = next((n.lineno for n in level if isinstance(n, (ast.expr, ast.stmt))), 1)
        return [(line, f"nested more than {rules.max_depth} deep")]
    found = list(_odd_names(source))
    found += [(getattr(n, "lineno", 1), reason) for n in nodes for reason in _judge_node(n, rules, name)]
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    return found + [(1, f"{name} must define {need}") for need in rules.files[name].needs if need not in defined]


def _odd_names(source: str) -> Iterator[tuple[int, str]]:
    """Those that are not ASCII. The parser normalizes names, so that the tree may have ASCII ones instead."""
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NAME and not token.string.isascii():
                yield token.start[0], f"identifiers must be ASCII: {token.string!a}"


def _judge_node(node: ast.AST, rules: Rules, file: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _judge_import(alias.name, rules, file)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield from _judge_import(f"{'.' * node.level}{node.module or ''}.{alias.name}", rules, file)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in rules.denied_calls:
            yield f"a candidate may not call {node.func.id}"
    elif isinstance(node, ast.Attribute):
        dotted = _dotted(node)
        if dotted in set(rules.denied_imports) - set(rules.files[file].imports):  # what is below it has this node in it
            yield f"a candidate may not use {dotted}"
    elif isinstance(node, ast.Constant):
        yield from _judge_constant(node.value, rules)
    elif isinstance(node, (ast.List, ast.Tuple, ast.Set)) and len(node.elts) > rules.max_row:
        yield f"a row of {len(node.elts)} elements; at most {rules.max_row}"
    elif isinstance(node, ast.Dict) and len(node.keys) > rules.max_row:
        yield f"a dict of {len(node.keys)} entries; at most {rules.max_row}"


def _judge_import(name: str, rules: Rules, file: str) -> Iterator[str]:
    imports = rules.imports + rules.files[file].imports
    allowed = any(name == m or name.startswith(m + ".") for m in imports)
    own = set(rules.files[file].imports)
    denied = any(name == m or name.startswith(m + ".") for m in rules.denied_imports if m not in own)
    if denied or not allowed:
        yield f"may not import {name}; allowed: {', '.join(imports)}"


def _judge_constant(value: object, rules: Rules) -> Iterator[str]:
    if isinstance(value, (str, bytes)):
        data = value.encode("utf-8", "replace") if isinstance(value, str) else value
        if len(data) > rules.max_text_literal:
            yield f"a literal of {len(data)} bytes; at most {rules.max_text_literal}"
        elif len(data) >= rules.incompressible_from:
            ratio = len(zlib.compress(data, 9)) / len(data)
            if ratio > rules.incompressible_ratio:
                yield f"a literal that does not compress (to {ratio:.0%} of its {len(data)} bytes)"
    elif isinstance(value, int) and abs(value) >= 10**rules.max_digits:
        yield f"an integer of more than {rules.max_digits} digits"


def _dotted(node: ast.Attribute) -> str:
    parts, inner = [node.attr], node.value
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    return ".".join([inner.id, *reversed(parts)]) if isinstance(inner, ast.Name) else ""
