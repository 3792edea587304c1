"""Everything shown in the README and in docs/ is run, for real."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import TINY
from rules import rule_job
from test_timed import job_of

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.judging.static import judge_source
from nanogpt_env.tiers import builtin_tiers, load_tier
from nanogpt_env.tracks import WallclockTier

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}-{i}")
        for page in PAGES
        for i, (name, text) in enumerate(FENCE.findall(page.read_text()))
        if name == language
    ]


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks(text, tmp_path):
    if "speedrun.save" in text:  # training code, not a script
        assert judge_source(text, "train.py") == []
        backend = LocalBackend("auto")
        result = backend.start(job_of(load_tier(TINY), text)).result(60)
        backend.close()
        assert result.completed, result.log
        return
    if "def configure" in text:  # a candidate, not a script
        assert judge_source(text, "optimizer.py") == []
        backend = LocalBackend("auto")
        result = backend.start(rule_job(load_tier(TINY), text, 10, "docs")).result(60)
        backend.close()
        assert result.completed, result.log
        return
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "Submit" in text:  # what is shown earns something
        assert "accepted" in done.stdout and float(done.stdout.split()[-1]) > 0.2, done.stdout


@pytest.mark.parametrize("text", blocks("sh"))
def test_shell_blocks(text, tmp_path):
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]
    for command in commands:
        match command:
            case ["make", target]:  # `make test` is what runs this
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            case ["pip", "install", what]:  # set-up, done already; its extras must exist
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                assert set(re.findall(r"[a-z]+", what)) <= set(extras)
            case ["nanogpt-env", *_]:
                program = Path(sys.executable).parent / "nanogpt-env"
                done = subprocess.run(
                    [program, *command[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=600
                )
                assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
                assert command[1] != "submit" or "reward +0.7" in done.stdout, done.stdout
            case _:
                pytest.fail(f"a documented command that no test runs: {command}")


@pytest.mark.parametrize(
    ("page", "number", "example"), [("README.md", 1, "quickstart.py"), ("docs/agents.md", 0, "own_agent.py")]
)
def test_page_and_example_show_the_same_program(page, number, example):
    example = (ROOT / "examples" / example).read_text().split('"""', 2)[2]
    shown = FENCE.findall((ROOT / page).read_text())[number][1]
    assert [x for x in shown.splitlines() if x] == [x for x in example.splitlines() if x]


@pytest.mark.parametrize("name", [n for n in builtin_tiers() if load_tier(n, host=False).measured.records])
def test_the_ladders_are_those_of_the_calibrations(name):
    assert ladder(load_tier(name)) in (ROOT / "docs" / "tiers.md").read_text(), (
        f"it should be:\n{ladder(load_tier(name))}"
    )


def ladder(tier):
    """A tier's paragraph and table in docs/tiers.md."""
    return (wallclock_ladder if isinstance(tier, WallclockTier) else steps_ladder)(tier)


def steps_ladder(tier):
    c = tier.measured
    rows = [
        f"**{tier.name}**: target {tier.table.training.target:.2f} nats, sigma {c.sigma:.4f}, public minus hidden shard"
        f" {c.shard_offset:+.4f} ± {c.shard_offset_error:.4f} (from run to run {c.shard_offset_sd:.4f})",
        "",
        "| record | technique | horizon | steps to target | value | sd of the hidden loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, record in tier.records.items():
        m = c.records[name]
        value = f"{m.value:g} ± {m.value_error:.1f}" if m.value else ""
        n = m.value_n or m.steps_n
        steps = f"{m.steps_mean:.1f} ± {m.steps_sd:.1f}"
        rows.append(
            f"| {name} | {record.technique} | {record.horizon} | {steps} | {value} | {m.loss_sd:.4f} (n = {n}) |"
        )
    return "\n".join(rows)


def wallclock_ladder(tier):
    """Of the host where it was calibrated, whatever was measured on this one."""
    c = tier.measured
    tier = tier.model_copy(update={"host": None})
    rows = [
        f"**{tier.name}**: target {tier.table.training.target:.2f} nats, sigma {c.sigma:.4f}, sd of a pair"
        f" {c.timing.pair_sd:.2%}, table floor {c.table_floor['bigrams']:.2f} nats"
        f" ({c.table_floor['finished']:.2f} after a short finish)",
        "",
        "| record | technique | tokens | time / start's | value | hidden loss | power |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, record in tier.records.items():
        m, ratio = c.records[name], c.timing.log_ratios.get(name)
        time = "1" if ratio is None else f"{math.exp(ratio):.3f} ± {c.timing.log_ratio_errors[name]:.1%}"
        loss = f"{m.loss_mean:.3f} ± {m.loss_sd:.4f} (n = {m.loss_n})"
        value = f"{tier.value_of(name):.3f}"
        rows.append(f"| {name} | {record.technique} | {m.tokens:,} | {time} | {value} | {loss} | {m.power:.2f} |")
    return "\n".join(rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
