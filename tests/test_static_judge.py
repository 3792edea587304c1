"""The static judge: honest rules pass, the case files are refused for their reason, hostile text is quick."""

import ast
import time
from pathlib import Path

import pytest

from nanogpt_env.content import content_root
from nanogpt_env.judging.static import judge_source, static_rules

CASES = content_root() / "judges" / "static" / "cases"
ACCEPT = sorted((CASES / "accept").glob("*.py"))
REJECT = sorted((CASES / "reject").glob("*.py"))
RECORDS = sorted((content_root() / "envs").glob("*/records/*/*.py"))
RULE = "def configure(params, horizon):\n    return None\n"
SOURCE_BYTES = 16384


def judge_rule(source, rules=None):
    return judge_source(source, "optimizer.py", rules)


def name(path):
    return f"{path.parts[-4]}/{path.parts[-2]}" if path in RECORDS else path.stem


def test_there_are_cases():
    assert len(ACCEPT) >= 10
    assert len(REJECT) >= 16
    assert sum(p.parts[-4] == "nano-steps" for p in RECORDS) == 5


@pytest.mark.parametrize("path", ACCEPT + RECORDS, ids=name)
def test_honest_rules_are_accepted(path):
    source = path.read_text(encoding="utf-8")
    assert judge_source(source, path.name if path in RECORDS else "optimizer.py") == []
    assert len(source.encode()) <= SOURCE_BYTES


@pytest.mark.parametrize("path", REJECT, ids=name)
def test_cases_are_refused_for_their_reason(path):
    source = path.read_text(encoding="utf-8")
    first, _, rest = source.partition("\n")
    assert first.startswith("# expect: ")
    reasons = judge_rule(source)
    assert any(first.removeprefix("# expect: ") in reason for reason in reasons), reasons
    assert len(reasons) == 1, "a case shows one reason"
    assert len(rest.encode()) <= SOURCE_BYTES, "the size cap would refuse it anyway"


def test_reasons_name_their_line():
    assert judge_rule("import torch\nimport os\n\n" + RULE)[0].startswith("line 2: may not import os")
    assert judge_rule("x = 1\n\neval('1')\n" + RULE) == ["line 3: a candidate may not call eval"]
    assert judge_rule("import torch\ntorch.hub.load\n" + RULE) == ["line 2: a candidate may not use torch.hub"]
    assert judge_rule("x = 1\n") == ["line 1: optimizer.py must define configure"]


def test_every_reason_is_given():
    reasons = judge_rule("import os\nimport sys\nopen('x')\n")
    assert len(reasons) == 4


@pytest.mark.parametrize(
    "line",
    ["from __future__ import annotations", "import torch.nn.functional as F", "from torch import *",
     "import math, functools", "from collections.abc import Mapping", "model.eval()", "f = torch.compile(g)",
     "input = 5", "x = 'eval(1)'", "torch.optim.Adam.step", "x = 10**40 - 1", f"x = {10**40 - 1}", "x = -1e300",
     f"x = '{'a' * 2048}'", f"x = [{'0, ' * 256}]", "x = [0.1] * 100_000", "x = 'é 日本語 🚀'  # ünï",
     "torch.hubs", "torchx = 1", r"x = 'a\d'", "x = 1or 2", "x = '''\n\\w\n'''"],
    ids=lambda line: line[:30],
)  # fmt: skip
def test_what_is_near_a_rule_but_fine(line):
    """Among them literals that Python warns about, which here are errors if they get through."""
    assert judge_rule(f"{line}\n{RULE}") == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"x = {10**40}", "integer"),
        (f"x = '{'a' * 2049}'", "2049 bytes"),
        (f"x = b'{'a' * 2049}'", "2049 bytes"),
        (f"x = '{'é' * 1025}'", "2050 bytes"),
        (f"x = f'{{y}}{'a' * 2049}'", "2049 bytes"),
        (f"x = [{'0, ' * 257}]", "row of 257"),
        (f"x = ({'0, ' * 257})", "row of 257"),
        (f"x = {{{'0, ' * 257}}}", "row of 257"),
        (f"x = {{{'**y, ' * 257}}}", "dict of 257"),
        ("import torchvision", "torchvision"),
        ("import mathx", "mathx"),
        ("import torch, os.path", "os.path"),
        ("from . import x", "may not import ..x"),
        ("from .. import torch", "may not import"),
        ("import torch.distributed as d", "torch.distributed"),
        ("x = torch.distributed.init_process_group()", "torch.distributed"),
        ("from torch.utils import cpp_extension", "cpp_extension"),
        ("x = torch.hub.load.y", "torch.hub"),
        ("if True:\n    breakpoint()", "breakpoint"),
        ("x = lambda: exec('1')", "exec"),
        ("def f(nаme): pass", "ASCII"),
        ("f(nаme=1)", "ASCII"),
        ("class Clаss: pass", "ASCII"),
        ("match x:\n    case {**rеst}: pass", "ASCII"),
        ("try: pass\nexcept ValueError as е: pass", "ASCII"),
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_limits(line, reason):
    reasons = judge_rule(f"{line}\n{RULE}")
    assert reasons
    assert all(reason in r for r in reasons)


HOSTILE = {
    "empty": "",
    "minus signs": "x = " + "-" * 100_000 + "1\n" + RULE,
    "nots": "x = " + "not " * 100_000 + "1\n" + RULE,
    "sum": "x = " + "+".join("1" * 8000) + "\n" + RULE,
    "short sum": "x = " + "+".join("1" * 1000) + "\n" + RULE,
    "powers": "x = " + "2**" * 100_000 + "2\n" + RULE,
    "parentheses": "(" * 100_000,
    "closed parentheses": "x = " + "(" * 5000 + ")" * 5000 + "\n" + RULE,
    "brackets": "x = " + "[" * 150 + "]" * 150 + "\n" + RULE,
    "lists in lists": "x = " + "[[]," * 100_000,
    "calls": "f" + "()" * 8000 + "\n" + RULE,
    "attributes": "x" + ".a" * 8000 + "\n" + RULE,
    "fewer attributes": "x" + ".a" * 2500 + "\n" + RULE,
    "subscripts": "x" + "[0]" * 5000 + "\n" + RULE,
    "lambdas": "x = " + "lambda: " * 2000 + "1\n" + RULE,
    "indents": "".join(" " * i + "if x:\n" for i in range(200)) + " " * 200 + "pass\n",
    "elifs": "if x: pass\n" + "elif x: pass\n" * 1200 + RULE,
    "f-strings": "x = f'" + "{x}" * 5000 + "'\n" + RULE,
    "nested f-strings": "x = " + "f'{" * 500 + "1" + "}'" * 500 + "\n" + RULE,
    "comprehensions": "x = [0 " + "for a in b " * 1500 + "]\n" + RULE,
    "comparisons": "x = 1" + " < 1" * 4000 + "\n" + RULE,
    "NUL": "x = '\0'\n" + RULE,
    "surrogate": "x = '\ud800'\n" + RULE,
    "byte order mark": "\ufeff\ufeff" + RULE,
    "form feeds": "\x0c" * 10_000 + RULE,
    "backslashes": "\\\n" * 8000 + RULE,
    "decimal digits": "x = " + "9" * 16_000 + "\n" + RULE,
    "hexadecimal digits": "x = 0x" + "f" * 16_000 + "\n" + RULE,
    "float": "x = " + "9" * 16_000 + "e9999\n" + RULE,
    "coding line": "# coding: rot13\n" + RULE,
    "unknown coding": "# -*- coding: no-such-thing -*-\n" + RULE,
    "bad escape": r"x = '\N{no such name}'" + "\n" + RULE,
    "unterminated": "x = '''" + "a" * 16_000,
    "tabs and spaces": "if x:\n\ty\n        z\n" + RULE,
    "carriage returns": "x = 1\r" * 2000,
    "decorators": "@f\n" * 4000 + RULE,
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_gets_an_answer_quickly(source):
    began = time.monotonic()
    reasons = judge_rule(source)
    assert time.monotonic() - began < 1
    assert isinstance(reasons, list)
    assert all(isinstance(r, str) and len(r.strip(": ")) > 10 and len(r) < 500 for r in reasons)
    assert len(reasons) < 100


ACCEPTABLE = {
    "brackets", "f-strings", "comparisons", "form feeds", "backslashes", "coding line", "unknown coding", "float",
    "decorators", "comprehensions",
}  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in HOSTILE if k not in ACCEPTABLE])
def test_hostile_text_is_refused(kind):
    assert judge_rule(HOSTILE[kind])


TRAINING_IMPORTS = ["copy", "numpy", "queue", "random", "speedrun", "threading", "time"]


@pytest.mark.parametrize("module", TRAINING_IMPORTS)
def test_each_kind_of_file_has_rules_of_its_own(module):
    line = f"import {module}\n"
    assert judge_source("import torch.distributed as d\ntorch.distributed.barrier()", "train.py") == []
    assert judge_source(line, "train.py") == []  # and it need not define anything
    (reason,) = judge_rule(line + RULE)
    assert reason.startswith(f"line 1: may not import {module};")
    for known in ("optimizer.py", "train.py"):  # these hold for all
        assert judge_source("import os\n" + RULE, known)[0].startswith("line 1: may not import os;")
        assert judge_source("eval('1')\n" + RULE, known) == ["line 1: a candidate may not call eval"]


def test_what_the_judge_accepts_can_be_normalised_and_compiled_deep_in_a_stack():
    """Callers sit at other depths of Python's stack than the judge: an accepted source must leave room."""
    from nanogpt_env.workspace import normal_form

    terms = next(n for n in range(400, 0, -1) if not judge_rule("x = " + "+".join("1" * n) + "\n" + RULE))
    assert 100 < terms < 250

    def deeper(n):
        return deeper(n - 1) if n else normal_form({"optimizer.py": "x = " + "+".join("1" * terms) + "\n" + RULE})

    assert deeper(600) == deeper(0)


def test_the_judge_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    judge_rule(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n" + RULE)
    assert not marker.exists()


def test_its_rules_come_from_the_file():
    rules = static_rules().model_copy(update={"imports": ("os",), "max_row": 2})
    assert judge_rule("import os\n" + RULE, rules) == []
    assert len(judge_rule("import math\nx = [1, 2, 3]\n" + RULE, rules)) == 2


def test_the_accepted_cases_are_as_the_linter_wants_the_rejected_are_left_alone():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "judges/static/cases/reject" in project["tool"]["ruff"]["extend-exclude"]
    for path in ACCEPT:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
