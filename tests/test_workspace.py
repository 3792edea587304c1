"""Edits of the in-memory workspace: exact or not at all."""

import difflib
import sys
import time
import unicodedata

import pytest

from nanogpt_env.errors import ActionError
from nanogpt_env.workspace import NOTES, NOTES_BYTES, Workspace, normal_form, parse_source, snapshot_hash

NAME = "optimizer.py"
SOURCE = "".join(f"line{i} = {i}\n" for i in range(1, 21))
CAP = 16384
BAD_PATHS = [
    "", ".", "..", "/", "../optimizer.py", "./optimizer.py", "/optimizer.py", "a/../optimizer.py", "..\\optimizer.py",
    "optimizer.py/", "Optimizer.py", "OPTIMIZER.PY", "optimizer.py ", " optimizer.py", "optimizer.py\0",
    "optimizer.py\n", "ｏptimizer.py", "torch.py", "/proc/self/root/optimizer.py", "optimizer.py:stream", "x" * 10**6,
    "\ud800", NOTES,
]  # fmt: skip


@pytest.fixture
def workspace():
    return Workspace({NAME: SOURCE}, {"task.md": "Be fast.\n"}, CAP)


def diff(before, after, context=3, name=NAME):
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{name}", f"b/{name}", n=context)
    return "".join(x if x.endswith("\n") else x + "\n\\ No newline at end of file\n" for x in lines)


def refuses(workspace, change, match="."):
    """`change` raises ActionError and changes nothing."""
    before = dict(workspace.files), dict(workspace.frozen), workspace.notes, dict(workspace.snapshots)
    with pytest.raises(ActionError, match=match) as caught:
        change()
    assert (workspace.files, workspace.frozen, workspace.notes, workspace.snapshots) == before
    return str(caught.value)


# --- reading ---


def test_read(workspace):
    workspace.note("an idea")
    assert workspace.read("") == "notes.md\noptimizer.py\ntask.md"
    assert workspace.read(NAME) == SOURCE
    assert workspace.read("task.md") == "Be fast.\n"
    assert workspace.read(NOTES) == "an idea\n"


@pytest.mark.parametrize("path", [p for p in BAD_PATHS if p not in ("", NOTES)], ids=lambda p: ascii(p[:30]))
def test_only_listed_files_can_be_read(workspace, path):
    refuses(workspace, lambda: workspace.read(path), "no file")


# --- writing and editing ---


def test_write(workspace):
    workspace.write(NAME, "x = 'é'\n\ty = 1\n")
    assert workspace.read(NAME) == "x = 'é'\n\ty = 1\n"


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda p: ascii(p[:30]))
def test_only_the_editable_file_can_be_changed(workspace, path):
    refuses(workspace, lambda: workspace.write(path, "x = 1\n"), "only optimizer.py can be edited")
    refuses(workspace, lambda: workspace.edit(path, "line1", "x"), "only optimizer.py can be edited")


def test_frozen_files_stay(workspace):
    refuses(workspace, lambda: workspace.write("task.md", "x"), "frozen")
    refuses(workspace, lambda: workspace.edit("task.md", "Be", "x"), "frozen")
    refuses(workspace, lambda: workspace.patch(diff("Be fast.\n", "Be slow.\n", name="task.md")), "frozen")


def test_edit(workspace):
    workspace.edit(NAME, "line7 = 7", "line7 = 8")
    assert workspace.read(NAME) == SOURCE.replace("line7 = 7", "line7 = 8")
    workspace.edit(NAME, "line7 = 8\n", "")
    assert "line7" not in workspace.read(NAME)


@pytest.mark.parametrize(("old", "count"), [("", 0), ("line99", 0), ("line1", 11), ("line", 20), ("\n", 20)])
def test_edit_needs_exactly_one_place(workspace, old, count):
    refuses(workspace, lambda: workspace.edit(NAME, old, "x"), f"occurs {count} times")


def test_size_cap_is_in_bytes(workspace):
    workspace.write(NAME, "é" * (CAP // 2))
    refuses(workspace, lambda: workspace.write(NAME, "é" * (CAP // 2) + "x"), f"{CAP} bytes, this has {CAP + 1}")
    workspace.write(NAME, "#" * (CAP - 1) + "x")
    refuses(workspace, lambda: workspace.edit(NAME, "x", "yz"), "bytes")
    assert len(workspace.read(NAME)) == CAP


def test_lone_surrogates_are_refused(workspace):
    refuses(workspace, lambda: workspace.write(NAME, "x = '\ud800'"), "valid Unicode")
    refuses(workspace, lambda: workspace.edit(NAME, "line7 = 7", "\udfff"), "valid Unicode")
    refuses(workspace, lambda: workspace.note("\ud800"), "valid Unicode")
    refuses(workspace, lambda: workspace.patch(diff(SOURCE, SOURCE + "x = '\ud800'\n")), "valid Unicode")


def test_every_control_and_format_character_is_refused(workspace):
    """Of this interpreter's Unicode tables: Cc, Cf, Zl and Zp but tab and newline; the bidi ones are Cf."""
    hidden = [
        c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"}
    ]  # fmt: skip
    assert {"\u202e", "\u2066", "\u200b", "\u061c", "\ufeff", "\r", "\x1b", "\0"} <= set(hidden)
    for character in set(hidden) - {"\t", "\n"}:
        refuses(workspace, lambda c=character: workspace.write(NAME, f"x = 1\n# {c}"), f"line 2.*{ord(character):04X}")


@pytest.mark.parametrize("text", ["", "x = 1", "# ünï → 日本語 ✓ ½ 🚀\n", "\tx\n", "# a\u0301 (combining)\n"])
def test_ordinary_text_is_accepted(workspace, text):
    workspace.write(NAME, text)
    assert workspace.read(NAME) == text


def test_crlf_is_refused_with_its_line(workspace):
    refuses(workspace, lambda: workspace.write(NAME, "x = 1\r\ny = 2\r\n"), r"line 1.*U\+000D")


# --- patches ---


@pytest.mark.parametrize("context", [0, 1, 3])
@pytest.mark.parametrize(
    "after",
    [
        SOURCE.replace("line7 = 7", "line7 = 70"),
        SOURCE.replace("line3 = 3\n", "").replace("line15 = 15\n", "x = 1\ny = 2\n"),
        SOURCE.replace("line10 = 10\n", "line10 = 10\nnew = 1\n"),
        "first = 0\nline1 = 1\n" + SOURCE[len("line1 = 1\n") :].replace("line9 = 9\n", ""),
        SOURCE + "last = 1\n",
        SOURCE.removesuffix("\n"),
        SOURCE + "last = 1",
        "changed = 1\n" * 30,
    ],
    ids=["one", "two-hunks", "insert", "top", "append", "lose-newline", "no-newline", "all"],
)
def test_a_diff_gives_exactly_its_target_and_back(workspace, after, context):
    if context == 0 and after.startswith("first"):
        after = after.replace("line2 = 2", "line2 = 3")
    there, back = diff(SOURCE, after, context), diff(after, SOURCE, context)
    assert workspace.patch(there) == [NAME]
    assert workspace.read(NAME) == after
    workspace.patch(back)
    assert workspace.read(NAME) == SOURCE


def test_patch_without_prefixes_and_with_a_git_header(workspace):
    after = SOURCE.replace("line7 = 7", "line7 = 70")
    body = diff(SOURCE, after).split("\n", 2)[2]
    workspace.patch(f"--- {NAME}\n+++ {NAME}\n{body}")
    assert workspace.read(NAME) == after
    workspace.revert("")
    git = f"diff --git a/{NAME} b/{NAME}\nindex 0123abc..4567def 100644\n--- a/{NAME}\n+++ b/{NAME}\n{body}"
    workspace.patch(git)
    assert workspace.read(NAME) == after


@pytest.mark.parametrize("tail", ["", "\n\n", "\n\n\n"])
def test_the_end_of_a_patch_may_lack_its_newline_or_have_more(workspace, tail):
    """As language models write them. The last line is an added one: joined to the next, it would be another program."""
    patch = f"--- a/{NAME}\n+++ b/{NAME}\n@@ -5,1 +5,2 @@\n line5 = 5\n+new = 1{tail}"
    workspace.patch(patch)
    assert workspace.read(NAME) == SOURCE.replace("line5 = 5\n", "line5 = 5\nnew = 1\n")


def test_a_file_patched_twice_in_one_patch_gets_both(workspace):
    middle = SOURCE.replace("line3 = 3", "line3 = 30")
    after = middle.replace("line15 = 15", "line15 = 150")
    workspace.patch(diff(SOURCE, middle) + diff(middle, after))
    assert workspace.read(NAME) == after


ONE = "@@ -7,1 +7,1 @@\n-line7 = 7\n+line7 = 70\n"
HEAD = f"--- a/{NAME}\n+++ b/{NAME}\n"


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ("", "no file"),
        ("hello", "no file"),
        ("\0", "no file"),
        (HEAD, "no file|no hunk"),
        (f"diff --git a/{NAME} b/{NAME}\nold mode 100644\nnew mode 100755\n", "no hunk"),
        (f"Binary files a/{NAME} and b/{NAME} differ\n", "binary"),
        (ONE, "not a unified diff"),
        (HEAD + "@@ -7,1 +7,1 @@\n-line7 = 7\n", "not a unified diff"),
        (HEAD + "@@ -7,9 +7,9 @@\n-line7 = 7\n+line7 = 70\n", "not a unified diff"),
        (HEAD + "@@ -" + "9" * 5000 + ",1 +7,1 @@\n-line7 = 7\n+line7 = 70\n", "not a unified diff"),
        (HEAD + ONE.replace("-7,1", "-8,1"), "does not fit"),
        (HEAD + ONE.replace("-7,1", "-0,1"), "does not fit"),
        (HEAD + ONE.replace("-7,1", "-99,1"), "does not fit"),
        (HEAD + ONE.replace("-line7 = 7", "-line7 = 7 "), "does not fit"),
        (HEAD + ONE.replace("-line7 = 7", "-Line7 = 7"), "does not fit"),
        (HEAD + "@@ -21,0 +22,1 @@\n+x = 1\n", "does not fit"),
        (HEAD + "@@ -99,0 +99,1 @@\n+x = 1\n", "does not fit"),
        (HEAD + ONE + ONE, "does not fit"),
        (HEAD + "@@ -9,1 +9,1 @@\n-line9 = 9\n+line9 = 90\n" + ONE, "does not fit"),
        (HEAD + ONE + "@@ -9,1 +9,1 @@\n-line9 = 0\n+line9 = 90\n", "does not fit"),
        (HEAD + "@@ -20,1 +20,1 @@\n-line20 = 20\n\\ No newline at end of file\n+x = 1\n", "does not fit"),
        ((HEAD + ONE).replace("\n", "\r\n"), "."),
        (HEAD + ONE.replace("\n", "\r\n"), "does not fit"),
        (HEAD + ONE.replace("70\n", "70\r\n"), "control"),
        (HEAD + ONE.replace("70\n", "70 # \u202e\n"), "control"),
        (HEAD + ONE.replace("70\n", "70 #" + "x" * CAP + "\n"), "bytes"),
        (HEAD + "@@ -7,1 +7,1 @@\n-line7 = 7\n+" + "x" * 5 * CAP + "\n", "characters"),
        ("--- /dev/null\n+++ b/new.py\n@@ -0,0 +1 @@\n+x = 1\n", "add, remove or rename"),
        (f"--- /dev/null\n+++ b/{NAME}\n@@ -0,0 +1 @@\n+x = 1\n", "add, remove or rename"),
        ("--- a/new.py\n+++ b/new.py\n@@ -1 +1 @@\n-x\n+y\n", "only optimizer.py"),
        (diff(SOURCE, "").replace(f"b/{NAME}", "/dev/null"), "add, remove or rename"),
        (diff(SOURCE, ""), "add, remove or rename"),
        (HEAD.replace(f"b/{NAME}", "b/other.py") + ONE, "add, remove or rename"),
        (HEAD.replace(f"a/{NAME}", f"{NAME}.orig") + ONE, "add, remove or rename"),
        (f"diff --git a/{NAME} b/x.py\nsimilarity index 100%\nrename from {NAME}\nrename to x.py\n", "rename"),
        (f"diff --git a/{NAME} b/{NAME}\ndeleted file mode 100644\n", "add, remove or rename"),
        ("diff --git a/x.py b/x.py\nnew file mode 120000\n--- /dev/null\n+++ b/x.py\n@@ -0,0 +1 @@\n+/etc\n", "add"),
        (HEAD.replace(NAME, f"../{NAME}") + ONE, "only optimizer.py"),
        (HEAD.replace(f"a/{NAME}", f"/{NAME}").replace(f"b/{NAME}", f"/{NAME}") + ONE, "only optimizer.py|rename"),
        (HEAD.replace("a/", "b/a/").replace("+++ b/", "+++ b/a/") + ONE, "only optimizer.py|rename"),
        (HEAD + ONE + "--- a/task.md\n+++ b/task.md\n@@ -1 +1 @@\n-Be fast.\n+Be slow.\n", "frozen"),
        (HEAD + ONE + "--- a/new.py\n+++ b/new.py\n@@ -1 +1 @@\n-x\n+y\n", "only optimizer.py"),
    ],
    ids=lambda x: ascii(x)[:40],
)  # fmt: skip
def test_a_patch_that_does_not_fit_exactly_changes_nothing(workspace, patch, reason):
    refuses(workspace, lambda: workspace.patch(patch), reason)


def test_a_patch_may_make_an_empty_last_line_but_not_need_one(workspace):
    """Blank lines after a hunk are no context."""
    workspace.write(NAME, "a = 1\nb = 2\n")
    workspace.patch(HEAD + "@@ -2,1 +2,1 @@\n-b = 2\n+b = 3\n\n\n")
    assert workspace.read(NAME) == "a = 1\nb = 3\n"


@pytest.mark.parametrize(
    "line",
    ["diff --git a://" + " " * 60000, "Binary files " + " and " * 12000, "diff --git " + ":// " * 15000,
     "@@ -" * 15000, "--- " * 15000, "+++ " * 15000],
    ids=lambda line: line[:12],
)  # fmt: skip
def test_a_hostile_patch_is_refused_quickly(workspace, line):
    began = time.monotonic()
    refuses(workspace, lambda: workspace.patch(line + "\n"))
    assert time.monotonic() - began < 1


def test_mangled_patches_raise_nothing_else(workspace):
    """Every line of a git diff dropped, doubled and swapped."""
    middle = diff(SOURCE, SOURCE.replace("line3 ", "x ").replace("line15 ", "y "), 1)
    lines = (f"diff --git a/{NAME} b/{NAME}\nindex 0..1 100644\n{middle}\\ No newline at end of file\n").splitlines(
        True
    )
    tried = 0
    for i in range(len(lines)):
        for j in range(len(lines)):
            mangled = lines[:i] + lines[j : j + 1] + lines[i + 1 :], lines[:i] + lines[j:], lines[:i] + lines[j:i:-1]
            for text in mangled:
                workspace.files[NAME] = SOURCE
                try:
                    workspace.patch("".join(text))
                except ActionError:
                    assert workspace.files[NAME] == SOURCE
                tried += 1
    assert tried > 500


# --- snapshots and notes ---


def test_revert(workspace):
    start = workspace.snapshot
    workspace.write(NAME, "x = 1\n")
    kept = workspace.keep()
    workspace.write(NAME, "x = 2\n")
    assert workspace.revert(kept[:8]) == kept
    assert workspace.read(NAME) == "x = 1\n"
    workspace.write(NAME, "x = 3\n")
    assert workspace.revert("") == start
    assert workspace.read(NAME) == SOURCE
    workspace.edit(NAME, "line7 = 7", "line7 = 8")
    assert workspace.revert(start) == start
    assert workspace.read(NAME) == SOURCE


def test_revert_to_what_was_not_kept(workspace):
    workspace.write(NAME, "x = 1\n")
    lost = workspace.snapshot
    workspace.write(NAME, "x = 2\n")
    refuses(workspace, lambda: workspace.revert(lost), "0 snapshots")
    refuses(workspace, lambda: workspace.revert("zz"), "0 snapshots")


def test_an_ambiguous_beginning_is_refused(workspace):
    for i in range(17):  # 18 hashes have 16 first digits
        workspace.write(NAME, f"x = {i}\n")
        workspace.keep()
    names = list(workspace.snapshots)
    digit = next(n[0] for n in names if sum(m[0] == n[0] for m in names) > 1)
    refuses(workspace, lambda: workspace.revert(digit), "snapshots begin with")


def test_a_kept_snapshot_is_a_copy(workspace):
    kept = workspace.keep()
    workspace.write(NAME, "x = 1\n")
    assert workspace.snapshots[kept] == {NAME: SOURCE}
    workspace.revert(kept)
    workspace.write(NAME, "x = 2\n")
    assert workspace.snapshots[kept] == {NAME: SOURCE}


def test_snapshot_hash_is_sensitive():
    base = {"a": "12", "b": "3"}
    same = snapshot_hash({"b": "3", "a": "12"})
    assert snapshot_hash(base) == same
    assert len(same) == 64
    others = [
        {"a": "1", "b": "23"}, {"a": "12", "c": "3"}, {"a": "12"}, {"a": "12", "b": "3 "}, {"b": "12", "a": "3"},
        {"a": "12\n", "b": "3"}, {"a": "é", "b": "3"}, {"a": "e\u0301", "b": "3"}, {"ab": "12", "": "3"}, {},
        {"a": "12b\x003"},
    ]  # fmt: skip
    assert len({same, *map(snapshot_hash, others)}) == len(others) + 1


def test_notes_are_no_part_of_a_snapshot(workspace):
    before = workspace.snapshot
    workspace.note("one")
    workspace.note("two\n")
    assert workspace.read(NOTES) == "one\ntwo\n"
    assert workspace.snapshot == before
    workspace.revert("")
    assert workspace.read(NOTES) == "one\ntwo\n"
    refuses(workspace, lambda: workspace.note("x" * NOTES_BYTES), "may have")
    refuses(workspace, lambda: workspace.note("\x1b[31mred"), "U[+]001B")


# --- normal form ---

PROGRAM = '''"""Adam."""
import torch

LR = 0.01


class Rule(torch.optim.Adam):
    """A rule."""

    def step(self):
        """Step."""
        super().step()


def configure(params, horizon):
    """Configure."""
    return Rule(params.values(), lr=LR)
'''


def form(source):
    return normal_form({"optimizer.py": source})


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s + "\n\n# a comment\n",
        lambda s: s.replace('"""Adam."""\n', ""),
        lambda s: s.replace('"""Adam."""', "'''Another docstring: \\d'''"),
        lambda s: s.replace('        """Step."""\n', ""),
        lambda s: s.replace('    """A rule."""\n\n', ""),
        lambda s: s.replace("    ", "  "),
        lambda s: s.replace("0.01", "1e-2  # lower"),
        lambda s: s.replace("(params, horizon)", "(\n    params,\n    horizon,\n)"),
        lambda s: s.replace("lr=LR)", "lr=(LR))"),
        lambda s: s.replace("\n\n\n", "\n"),
    ],
)
def test_normal_form_ignores_comments_layout_and_docstrings(change):
    assert change(PROGRAM) != PROGRAM
    assert form(change(PROGRAM)) == form(PROGRAM)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.replace("0.01", "0.02"),
        lambda s: s.replace("0.01", "'0.01'"),
        lambda s: s.replace("LR", "Lr"),
        lambda s: s.replace("lr=LR", "eps=LR"),
        lambda s: s.replace("lr=LR", "LR"),
        lambda s: s + "pass\n",
        lambda s: s.replace("super().step()", "super().step\n        ()"),
        lambda s: s.replace("super().step()", "pass"),
        lambda s: s.replace("class Rule", "class Rule2"),
        lambda s: s.replace("def configure", "async def configure"),
    ],
)
def test_normal_form_tells_programs_apart(change):
    assert change(PROGRAM) != PROGRAM
    assert form(change(PROGRAM)) != form(PROGRAM)


@pytest.mark.parametrize(
    ("one", "other"),
    [("x = 1", "x = 1.0"), ("x = 1", "x = True"), ("x = 0.0", "x = -0.0"), ("x = 'a'", "x = b'a'"),
     ("x = None", "x = ..."), ("x = [1]", "x = (1,)"), ("f(a, *b)", "f(*a, b)"), ("f([a, b])", "f([a], b)"),
     ("a; b", "a, b"), ("if a:\n b\nc", "if a:\n b\n c"), ("x = 'a' 'b'", "x = 'a', 'b'"),
     ("def f(): 'a'", "def f(): 'a'; 'b'")],
)  # fmt: skip
def test_normal_form_tells_apart(one, other):
    assert form(one) != form(other)


def test_normal_form_of_a_deep_expression():
    """A sum of two thousand terms is a tree two thousand deep: legal, and no reason to raise."""
    assert form("x = " + "+".join("1" * 2000)) != form("x = " + "+".join("1" * 2001))


def test_normal_form_is_of_all_files_and_their_names():
    one, other = "x = 1\n", "x = 2\n"
    both = normal_form({"a.py": one, "b.py": other})
    assert both == normal_form({"b.py": other + "# same", "a.py": one})
    assert len({both, normal_form({"a.py": other, "b.py": one}), normal_form({"a.py": one}), form(one)}) == 4


def test_a_syntax_error_names_its_file():
    with pytest.raises(SyntaxError) as caught:
        parse_source("def f(:", "train.py")
    assert caught.value.filename == "train.py"
    assert parse_source("x = 'a\\d'", "train.py").body  # without a warning


# --- speed ---


def test_edits_are_fast(workspace):
    """They take well under 1 ms; the bound leaves room for a loaded machine."""
    lines = [f"x{i:03} = {i:03}  # " + "y" * 48 + "\n" for i in range(256)]
    text = "".join(lines)
    assert 15000 < len(text) <= CAP
    workspace.write(NAME, text)
    changes = {
        "write": lambda i: workspace.write(NAME, text),
        "read": lambda i: workspace.read(NAME),
        "edit": lambda i: workspace.edit(NAME, f"x{i:03} = {i:03}", f"x{i:03} = {i + 500:03}"),
        "snapshot": lambda i: workspace.snapshot,
    }
    for name, change in changes.items():
        times = []
        for i in range(51):
            began = time.perf_counter()
            change(i)
            times.append(time.perf_counter() - began)
        assert sorted(times)[25] < 0.005, name
