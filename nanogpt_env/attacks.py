"""The attack suite: hostile and honest candidates, run on a sandbox of this host and by a deliberately naive scorer.

Cases are files in tests/attacks: a block of settings as a comment, a line that says what it tries, and the candidate;
or, in tests/attacks/actions, a file that an agent tries to write.
An attack that the naive scorer stands is no attack: its verdict here would say nothing. Runs are short; what counts as
a gain is a loss that lies `MARGIN` below that of the honest control, or `FASTER` of its time. Our static judge refuses
most of these sources; as it is no boundary, they are run all the same.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from nanogpt_env import content
from nanogpt_env.actions import WriteFile, parse_action
from nanogpt_env.backends import Backend
from nanogpt_env.errors import ActionError, BackendError
from nanogpt_env.judging.static import judge_source
from nanogpt_env.tiers import load_tier
from nanogpt_env.trap import Trap
from nanogpt_env.types import Plan, Record, RunResult
from nanogpt_env.workspace import Workspace

MARGIN = 0.1
"""nats per token"""
FASTER = 0.6
STEPS = 30
NAIVE_TIMEOUT_S = 30.0
MEMORY_BYTES, DISK_BYTES, LOG_BYTES, THREADS = 1 << 31, 64 << 20, 1 << 20, 512
TRACKS = {"steps": "nano-steps", "wallclock": "nano-wallclock", "free": "tiny-free"}
MAIN_FILE = {"steps": "optimizer.py", "wallclock": "train.py", "free": "model.py"}
RESOURCES = ("memory", "disk", "log", "escape", "time", "threads")
Verdict = Literal["caught", "no effect", "PASSED THROUGH", "honest", "REFUSED"]
_BLOCK = re.compile(r"\A# /// attack\n((?:# .*\n)*?)# ///\n")
_RESULT = re.compile(r"val_loss:(\S+) train_time:(\S+?)ms")


class Case(Record):
    """One candidate. `gains`: what it gets from the naive scorer: 'score', an effect of the trap or a resource; empty
    for an honest control."""

    name: str
    track: Literal["steps", "wallclock", "free", "actions"]
    idea: str
    source: str
    threats: tuple[str, ...]
    gains: str
    runs: int = 1
    needs: tuple[str, ...] = ()
    path: str = ""
    """of the file that an action writes; otherwise it is the candidate's"""

    @property
    def honest(self) -> bool:
        return not self.gains


class Outcome(Record):
    """What became of a case."""

    case: str
    threats: tuple[str, ...]
    verdict: Verdict
    detail: str
    naive: str
    """what it got from the naive scorer; empty if it was not asked"""


class Measured(Record):
    """One run, by either scorer."""

    loss: float = math.inf
    seconds: float = math.inf
    log: str = ""
    effects: dict[str, str] = Field(default_factory=dict)
    left: int = 0
    ended: bool = True
    peak_bytes: int = 0
    written_bytes: int = 0
    exit_reason: str = "completed"


def load_cases() -> list[Case]:
    """All of tests/attacks. Raises `ValueError` on a file that has no block of settings."""
    folder = content.attack_content("attacks")
    actions = [load_action(path) for path in sorted((folder / "actions").glob("*.toml"))]
    return [*(load_case(path) for track in TRACKS for path in sorted((folder / track).glob("*.py"))), *actions]


def load_action(path: Path) -> Case:
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
    return Case(name=f"actions/{path.stem}", track="actions", source=settings.pop("text"), **settings)


def load_case(path: Path) -> Case:
    text = path.read_text(encoding="utf-8")
    block = _BLOCK.match(text)
    if not block:
        raise ValueError(f"{path} does not begin with an attack block")
    settings = tomllib.loads("".join(line[2:] for line in block[1].splitlines(keepends=True)))
    body = text[block.end() :]
    idea = body.split('"""')[1].split(" (Follows")[0]
    return Case(name=f"{path.parent.name}/{path.stem}", track=path.parent.name, idea=idea, source=body, **settings)


class Suite:
    """Cases against one backend. `ask_naive`: the naive scorer as well, on this host, outside of any sandbox."""

    def __init__(self, backend: Backend, trap: Trap, folder: Path, ask_naive: bool) -> None:
        self.backend, self.trap, self.ask_naive = backend, trap, ask_naive
        self.naive = NaiveScorer(trap, folder)
        self._control: dict[str, Measured] = {}

    def run(self, case: Case) -> Outcome:
        """Raises `BackendError` if the backend itself fails."""
        track = _DRIVER.get(case.track, case.track)
        control = self._control.get(track) or self._measure_control(track)  # which unpacks the data, too
        told = self.naive.gain(case) if self.ask_naive and not case.honest else ""
        if case.track == "actions":
            return self._write(case, told)
        refused = judge_source(self._source(case), MAIN_FILE[case.track])
        for _ in range(case.runs - 1):
            self._train(case)
        measured = self._measure(case)
        verdict, detail = judge(case, measured, control)
        if verdict in ("caught", "no effect") and refused:
            detail += f"; the static judge refuses it ({refused[0]})"
        return Outcome(case=case.name, threats=case.threats, verdict=verdict, detail=detail, naive=told)

    def _write(self, case: Case, told: str) -> Outcome:
        workspace = Workspace({"optimizer.py": ""}, {"task.md": ""}, 1 << 14)
        try:
            action = parse_action({"type": "write_file", "path": self.trap.placed(case.path), "text": case.source})
            assert isinstance(action, WriteFile)
            workspace.write(action.path, action.text)
            verdict, detail = "PASSED THROUGH", "it was written"
        except ActionError as error:
            verdict, detail = "caught", f"refused: {error}"
        return Outcome(case=case.name, threats=case.threats, verdict=verdict, detail=detail, naive=told)

    def _measure_control(self, track: str) -> Measured:
        control = next(case for case in load_cases() if case.track == track and case.honest)
        self._control[track] = measured = self._measure(control)
        if measured.exit_reason != "completed":
            raise BackendError(f"the honest control of {track} does not run: {measured.exit_reason}\n{measured.log}")
        return measured

    def _source(self, case: Case) -> str:
        more = self.naive.weights() if "weights" in case.needs else {}
        before = _honest_model() if case.track == "free" else ""
        return before + self.trap.source(case.source, **more)

    def _measure(self, case: Case) -> Measured:
        result = self._train(case)
        left, written = len(self.trap.left()), self.trap.written_bytes()
        return Measured(
            loss=next(iter(result.val_losses.values()), math.inf),
            seconds=result.train_seconds or math.inf,
            log=result.log,
            effects=self.trap.effects(result.log),
            left=left,
            written_bytes=written,
            peak_bytes=result.candidate_peak_bytes,
            exit_reason=result.exit_reason,
        )

    def _train(self, case: Case) -> RunResult:
        sources = {MAIN_FILE[case.track]: self._source(case)}
        tier = load_tier(_tier(case.track), calibrated=False)
        if case.track == "free":
            sources["train.py"] = tier.record("window-short").sources["train.py"]
        plan = Plan(steps=STEPS, horizon=STEPS) if case.track == "steps" else None
        job = tier.job(sources, plan, "1", (tier.table.data.public,))
        limits = {"stall_s": 5.0, "setup_cpu_s": 30.0} if case.track != "steps" else {"stall_s": 5.0}
        job = job.model_copy(update={"limits": job.limits.model_copy(update=limits)})
        return self.backend.start(job).result(300)


def summary(outcomes: list[Outcome]) -> str:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.verdict] = counts.get(outcome.verdict, 0) + 1
    return f"{len(outcomes)} cases: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def judge(case: Case, measured: Measured, control: Measured) -> tuple[Verdict, str]:
    """What a run of a case says."""
    reached = dict(measured.effects)
    if measured.left:
        reached["left"] = f"{measured.left} processes were left"
    if resource_used := _used(case.gains, measured):
        reached[case.gains] = resource_used
    better = measured.loss < control.loss - MARGIN
    sooner = measured.seconds < FASTER * control.seconds and measured.loss < control.loss + MARGIN
    if measured.exit_reason == "completed" and (better or (sooner and case.track == "wallclock")):
        reached["score"] = f"loss {measured.loss:.3f} instead of {control.loss:.3f}, {measured.seconds:.2f} s"
    if reached:
        return "PASSED THROUGH", "; ".join(f"{name}: {text}" for name, text in reached.items())
    if case.honest:
        return ("honest", "") if measured.exit_reason == "completed" else ("REFUSED", measured.exit_reason)
    if measured.exit_reason != "completed":
        return "caught", measured.exit_reason
    return "no effect", f"loss {measured.loss:.3f}, the control's is {control.loss:.3f}"


def _used(gains: str, measured: Measured) -> str:
    """What of a resource was had, if it is more than anybody should."""
    if gains == "memory" and measured.peak_bytes > MEMORY_BYTES:
        return f"{measured.peak_bytes >> 20} MiB"
    if gains == "disk" and measured.written_bytes > DISK_BYTES:
        return f"{measured.written_bytes >> 20} MiB"
    if gains == "log" and len(measured.log) > LOG_BYTES:
        return f"a log of {len(measured.log) >> 10} KiB"
    if gains == "escape" and "\x1b" in measured.log:
        return "control sequences in the log"
    if gains == "time" and not measured.ended:
        return "it did not end"
    if gains == "threads" and (found := re.search(r"^probe threads (\d+)$", measured.log, re.MULTILINE)):
        return f"{found[1]} threads" if int(found[1]) > THREADS else ""
    return ""


_DRIVER = {"actions": "steps"}
_RULE = """
import torch
def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01)
"""


class NaiveScorer:
    """Runs a candidate in a subprocess that holds the data and evaluates itself, and takes the last match of a regular
    expression in its output for the result. Its drivers are in tests/attacks/naive."""

    def __init__(self, trap: Trap, folder: Path) -> None:
        self.trap, self.folder = trap, folder
        self._controls: dict[str, Measured] = {}
        self._weights: dict[str, Any] = {}

    def gain(self, case: Case) -> str:
        """What the case gets; empty: nothing, so it is no attack."""
        track = _DRIVER.get(case.track, case.track)
        if track not in self._controls:
            honest = next(c for c in load_cases() if c.track == track and c.honest)
            self._controls[track] = self._measure(honest)
        control, measured = self._controls[track], self._measure(case)
        found = measured.effects | ({"left": "a process was left"} if measured.left else {})
        if used := _used(case.gains, measured):
            found[case.gains] = used
        # the comparison that so many scripts make: what is not a number exceeds nothing
        if not measured.loss > control.loss - MARGIN or measured.seconds < FASTER * control.seconds:
            found["score"] = f"loss {measured.loss:.3f} instead of {control.loss:.3f}, {measured.seconds:.2f} s"
        return found.get(case.gains, "")

    def weights(self) -> dict[str, Any]:
        """Of a longer training on published ids, by a rule of ours, as constants for a candidate's source."""
        if not self._weights:
            case = Case(name="weights", track="steps", idea="", source=_TRAIN_WEIGHTS, threats=(), gains="")
            self._measure(case, "300")
            self._weights = json.loads((self.folder / "weights.json").read_text())
        return self._weights

    def _measure(self, case: Case, steps: str = str(STEPS)) -> Measured:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            work = Path(name)
            self._furnish(work, case)
            runs = [self._run(work, case, steps) for _ in range(case.runs)]
            return runs[-1]

    def _furnish(self, work: Path, case: Case) -> None:
        root = content.content_root()
        shutil.copy(root / "gpu_backend" / "model.py", work)
        for path in (content.attack_content("attacks") / "naive").glob("*.py"):
            shutil.copy(path, work / (path.name if path.stem == "speedrun" else f"score_{path.name}"))
        for shard, name in (("train", "train.bin"), ("val_public", "val.bin")):
            (found,) = content.cache_dir().glob(f"shakespeare-*/{shard}.bin")
            np.fromfile(found, np.uint16)[512:].tofile(work / name)  # without the header
        more = self.weights() if "weights" in case.needs else {}
        before = ""
        if case.track == "free":
            before = _honest_model()
            (work / "honest.py").write_text(before)
        if case.path:  # as one joins paths at first
            (work / MAIN_FILE["steps"]).write_text(_RULE)
            Path(os.path.join(work, self.trap.placed(case.path))).write_text(case.source)
            return
        source = before + self.trap.source(case.source, **more, CONTENT=[str(work / "val.bin")])
        (work / MAIN_FILE[case.track]).write_text(source, encoding="utf-8")

    def _run(self, work: Path, case: Case, steps: str) -> Measured:
        track = _DRIVER.get(case.track, case.track)
        script = {"steps": "score_steps.py", "wallclock": "train.py", "free": "score_free.py"}[track]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, script, steps],
                cwd=work,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            until = time.monotonic() + NAIVE_TIMEOUT_S
            while not (found := os.wait4(process.pid, os.WNOHANG))[0] and time.monotonic() < until:
                time.sleep(0.02)
            ended = bool(found[0])
            if not ended:
                os.killpg(process.pid, signal.SIGKILL)
                found = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(found[1])
            output.seek(0)
            log = output.read(64 << 20).decode("utf-8", "replace")
        matches = _RESULT.findall(log)
        loss, milliseconds = (_number(text) for text in matches[-1]) if matches else (math.inf, math.inf)
        left, written = len(self.trap.left()), self.trap.written_bytes()
        return Measured(
            loss=loss,
            seconds=milliseconds / 1000,
            log=log,
            effects=self.trap.effects(log),
            left=left,
            ended=ended,
            peak_bytes=found[2].ru_maxrss * 1024,
            written_bytes=written,
        )


# leaves its weights, eight bits each, in a file
_TRAIN_WEIGHTS = """
import base64, json, torch
kept = {}
def init(params):
    kept.update(params)
def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
def schedule(step, horizon, optimizers):
    if step + 1 == horizon:
        scales = {name: float(p.abs().max()) / 127 for name, p in kept.items()}
        data = b"".join(
            (kept[name] / scales[name]).round().to(torch.int8).detach().numpy().tobytes() for name in sorted(kept)
        )
        with open("../weights.json", "w") as file:
            json.dump({"WEIGHTS": base64.b85encode(data).decode(), "SCALES": scales}, file)
"""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def _honest_model() -> str:
    tier = load_tier(_tier("free"), calibrated=False)
    return tier.record("window-short").sources["model.py"] + "\n\n"


def _tier(track: str) -> str | Path:
    name = TRACKS[track]
    return content.attack_content(name) if track == "free" else name
