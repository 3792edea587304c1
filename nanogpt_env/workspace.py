"""The files an agent edits. They live in memory; nothing here runs code or touches a disk."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import re
import tokenize
import warnings
from collections.abc import Mapping
from typing import Any

from nanogpt_env.errors import ActionError

NOTES = "notes.md"
NOTES_BYTES = 1 << 18
# Unicode's control, format and line-separator characters but tab and newline: they let a text read
# differently from how it runs.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Headers on which the diff parser's regular expressions take quadratic time.
_COSTLY_HEADER = re.compile(r"^(?:Binary file|diff --git .{200})", re.MULTILINE)


def snapshot_hash(files: Mapping[str, str]) -> str:
    """Content hash of the editable files: 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(files):
        text = files[name].encode()
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


def parse_source(source: str, name: str) -> ast.Module:
    """The syntax tree, without Python's warnings about literals such as "\\d"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source, name)


def apart(source: str, name: str) -> tuple[list[str], list[tuple[int, str]]]:
    """(lines without comments, comments with their line numbers), a line of the source each. Raises `SyntaxError`."""
    lines = source.split("\n")
    comments = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                comments.append((row, token.string))
                lines[row - 1] = lines[row - 1][:column].rstrip()
        if same_program("\n".join(lines), source, name):
            return lines, comments
    except (tokenize.TokenError, IndexError, ValueError, RecursionError) as error:
        raise SyntaxError(f"{name}: {error}") from None
    raise SyntaxError(f"{name}: its comments cannot be told from its program")


def same_program(one: str, other: str, name: str) -> bool:
    """Whether two sources have the same syntax tree. Raises as `parse_source`."""
    return ast.dump(parse_source(one, name)) == ast.dump(parse_source(other, name))


@functools.lru_cache(maxsize=64)  # asked for every job, of few programs
def without_comments(source: str, name: str) -> str:
    """What runs: a program could read its comments, which no judge takes for a part of it. Lines stay where they are.
    What is no Python is left to fail as it is."""
    try:
        return "\n".join(apart(source, name)[0])
    except SyntaxError:
        return source


def normal_form(sources: Mapping[str, str], numbers: bool = True) -> str:
    """Hash of a program without comments, layout and docstrings: equal for equal programs. Without `numbers` equal for
    those, too, that differ in nothing else."""
    return snapshot_hash({name: _normal_form(parse_source(text, name), numbers) for name, text in sources.items()})


def _normal_form(tree: ast.Module, numbers: bool) -> str:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            body = node.body
            if ast.get_docstring(node, clean=False) is not None:
                node.body = body[1:] or [ast.Pass()]
    digest = hashlib.sha256()
    rest: list[object] = [tree]
    while rest:  # no recursion, which deep expressions would exhaust
        item = rest.pop()
        if not numbers and isinstance(item, ast.Constant) and type(item.value) in (int, float, complex):
            digest.update(b"number\n")
        elif isinstance(item, ast.AST):
            values: list[object] = [value for _, value in ast.iter_fields(item)]
            digest.update(f"{type(item).__name__} {len(values)}\n".encode())
            rest += reversed(values)
        elif isinstance(item, list):
            digest.update(f"list {len(item)}\n".encode())
            rest += reversed(item)
        else:
            digest.update(f"{type(item).__name__} {item!r}\n".encode())
    return digest.hexdigest()


class Workspace:
    """`editable` files under edit, `frozen` ones to read, and notes. Every change is checked first and
    raises `ActionError` without effect if it cannot be done."""

    def __init__(self, editable: Mapping[str, str], frozen: Mapping[str, str], max_bytes: int) -> None:
        self.files, self.frozen, self.max_bytes = dict(editable), dict(frozen), max_bytes
        self.notes = ""
        self.snapshots: dict[str, dict[str, str]] = {}
        self.start = self.keep()

    @property
    def snapshot(self) -> str:
        return snapshot_hash(self.files)

    def keep(self) -> str:
        """Remember the present files, so that `revert` can bring them back. Returns the snapshot."""
        name = self.snapshot
        self.snapshots.setdefault(name, dict(self.files))
        return name

    def read(self, path: str) -> str:
        if not path:
            return "\n".join(sorted({*self.files, *self.frozen, NOTES}))
        if path == NOTES:
            return self.notes
        if path in self.files:
            return self.files[path]
        if path in self.frozen:
            return self.frozen[path]
        raise ActionError(f"no file {path!r}; there are {', '.join([*self.files, *self.frozen, NOTES])}")

    def write(self, path: str, text: str) -> None:
        self._editable(path)
        self.files[path] = _checked(path, text, self.max_bytes)

    def edit(self, path: str, old: str, new: str) -> None:
        self._editable(path)
        found = self.files[path].count(old) if old else 0
        if found != 1:
            raise ActionError(
                f"`old` must occur exactly once in {path}, it occurs {found} times"
                + ("; give more of the lines around it" if found else "")
            )
        self.files[path] = _checked(path, self.files[path].replace(old, new), self.max_bytes)

    def patch(self, text: str) -> list[str]:
        """Apply a unified diff and return the changed paths. All hunks fit exactly or nothing changes."""
        from unidiff.errors import UnidiffParseError
        from unidiff.patch import PatchSet

        if len(text) > 4 * self.max_bytes:
            raise ActionError(f"a patch may have {4 * self.max_bytes} characters, this has {len(text)}")
        if _COSTLY_HEADER.search(text):
            raise ActionError("a patch may not be of binary files or have headers of over 200 characters")
        try:
            parsed = PatchSet(text if text.endswith("\n") else text + "\n")
        except (UnidiffParseError, ValueError) as error:
            raise ActionError(f"not a unified diff: {error}") from None
        if not parsed:
            raise ActionError("the patch changes no file; a unified diff begins with --- and +++ lines")
        changed: dict[str, str] = {}
        for part in parsed:
            if part.is_added_file or part.is_removed_file or part.is_rename:
                raise ActionError("a patch may change files but not add, remove or rename them")
            self._editable(part.path)
            if not part:
                raise ActionError(f"the patch has no hunk for {part.path}")
            before = changed.get(part.path, self.files[part.path])
            changed[part.path] = _checked(part.path, _apply(part, before), self.max_bytes)
        self.files |= changed
        return list(changed)

    def revert(self, snapshot: str) -> str:
        """Bring a kept snapshot back, named by its hash or a beginning of it; '' is the start."""
        names = [n for n in self.snapshots if n.startswith(snapshot)] if snapshot else [self.start]
        if len(names) != 1:
            raise ActionError(f"{len(names)} snapshots begin with {snapshot!r}; runs and submissions keep one each")
        self.files = dict(self.snapshots[names[0]])
        return names[0]

    def note(self, text: str) -> None:
        self.notes = _checked(NOTES, self.notes + (text if text.endswith("\n") else text + "\n"), NOTES_BYTES)

    def state(self) -> dict[str, Any]:
        """Files, notes and kept snapshots as JSON-ready data."""
        snapshots = {name: dict(files) for name, files in self.snapshots.items()}
        return {"files": dict(self.files), "notes": self.notes, "snapshots": snapshots}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a `state`, checked like any edit: it may have been stored, and edited, elsewhere."""
        try:
            versions = [state["files"], *state["snapshots"].values()]
            for files in versions:
                if set(files) != set(self.files):
                    raise ActionError(f"a checkpoint holds {', '.join(self.files)}, not {', '.join(map(str, files))}")
                for path, text in files.items():
                    _checked(path, text, self.max_bytes)
            notes = _checked(NOTES, state["notes"], NOTES_BYTES)
        except (AttributeError, KeyError, TypeError) as error:
            raise ActionError(f"not a checkpoint: {error!r}") from None
        self.files, self.notes = dict(state["files"]), notes
        self.snapshots |= {snapshot_hash(files): dict(files) for files in versions[1:]}

    def _editable(self, path: str) -> None:
        if path in self.frozen:
            raise ActionError(f"{path} is frozen")
        if path not in self.files:
            raise ActionError(f"only {', '.join(self.files)} can be edited, not {path!r}")


def _checked(path: str, text: str, max_bytes: int) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ActionError(f"{path} must be valid Unicode text") from None
    if size > max_bytes:
        raise ActionError(f"{path} may have {max_bytes} bytes, this has {size}")
    if bad := _INVISIBLE.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise ActionError(f"{path} line {line}: control or invisible character U+{ord(bad[0]):04X}")
    return text


def _apply(part: Any, text: str) -> str:
    """One file's hunks (of unidiff, which has no types); each must match the lines at the place it names."""
    lines, result, position = text.splitlines(keepends=True), [], 0
    for hunk in part:
        expected, replacement = _sides(hunk)
        # a hunk without old lines names the line that it comes after
        start = hunk.source_start - 1 if expected else hunk.source_start
        if not position <= start <= len(lines) or lines[start : start + len(expected)] != expected:
            raise ActionError(
                f"the hunk at line {hunk.source_start} does not fit {part.path}; read the file again, or use edit_file"
            )
        result += lines[position:start] + replacement
        position = start + len(expected)
    return "".join(result + lines[position:])


def _sides(hunk: Any) -> tuple[list[str], list[str]]:
    """The old and the new lines of a hunk. A marker takes the newline off the line before it."""
    old: list[str] = []
    new: list[str] = []
    touched: list[list[str]] = []
    for line in hunk:
        if line.line_type == "\\":
            for side in touched:
                side[-1] = side[-1].removesuffix("\n")
            continue
        touched = {" ": [old, new], "-": [old], "+": [new]}.get(line.line_type, [])
        for side in touched:
            side.append(line.value)
    return old, new
