"""A scorer as one writes it at first, and what an attack gets from it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from nanogpt_env import content
from nanogpt_env.attacks.cases import FILES, Case, Measured, load_cases
from nanogpt_env.trap import Trap

MARGIN = 0.1
"""nats per token"""
FASTER = 0.6
STEPS = 30
NAIVE_TIMEOUT_S, WHOLE_TIMEOUT_S = 30.0, 300.0  # of a short run, and of one that a submission asks for
MEMORY_BYTES, DISK_BYTES, LOG_BYTES, THREADS = 1 << 31, 64 << 20, 1 << 20, 512
SCRIPTS = {"steps": "score_steps.py", "wallclock": "train.py", "free": "score_free.py"}
RERUNS, TRIES, LEVEL = 10, 20, 0.01
_RESULT = re.compile(r"val_loss:(\S+) train_time:(\S+?)ms")
_RULE = """
import torch
def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01)
"""


class NaiveScorer:
    """Runs a candidate in a subprocess that holds the data and evaluates itself, and takes the last match of a regular
    expression in its output, or in a file result.txt, for the result. Its drivers are in tests/attacks/naive."""

    def __init__(self, trap: Trap, folder: Path, asked: bool = True) -> None:
        self.trap, self.folder, self.asked = trap, folder, asked
        self._controls: dict[str, Measured] = {}
        self._weights: dict[str, Any] = {}
        self._target = math.nan
        self._seeds: dict[str, int] = {}

    def gain(self, case: Case) -> str:
        """What the case gets; empty: nothing, so it is no attack."""
        if case.track == "submissions":
            return self._verify(case)
        control, measured = self._control(case), self._measure(case)
        found = measured.effects | ({"left": "a process was left"} if measured.left else {})
        if used := resource_used(case.gains, measured):
            found[case.gains] = used
        # the comparison that so many scripts make: what is not a number exceeds nothing
        if not measured.loss > control.loss - MARGIN or measured.seconds < FASTER * control.seconds:
            found["score"] = f"loss {measured.loss:.3f} instead of {control.loss:.3f}, {measured.seconds:.2f} s"
        return found.get(case.gains, "")

    def weights(self) -> dict[str, Any]:
        """Of a longer training on published ids, by a rule of ours, as constants for a candidate's source."""
        if not self._weights:
            case = Case(name="weights", track="steps", idea="", source=_TRAIN_WEIGHTS, threats=(), gains="")
            self._measure(case, 300)
            self._weights = json.loads((self.folder / "weights.json").read_text())
        return self._weights

    def target(self) -> float:
        """Nats: what the honest submission reaches with eight standard errors to spare."""
        if math.isnan(self._target):
            honest = next(case for case in load_cases() if case.track == "submissions" and case.honest)
            losses = [run.loss for run in self._reruns(honest, RERUNS)]
            self._target = statistics.mean(losses) + 8 * statistics.stdev(losses) / math.sqrt(len(losses))
        return self._target

    def lucky_seed(self, case: Case) -> int:
        """The best of some, for the record that the case follows."""
        if case.name not in self._seeds:
            honest = case.model_copy(update={"source": "", "needs": ()})
            losses = [run.loss for run in self._reruns(honest, TRIES)]
            self._seeds[case.name] = 1 + losses.index(min(losses))
        return self._seeds[case.name]

    def _verify(self, case: Case) -> str:
        """As protocols that are in use do: the one of ten runs that dropped those that failed, and found equal losses
        significant; the one that takes a single run's word; the one that takes a single pair's."""
        if case.naive == "one pair":
            honest = case.model_copy(update={"source": ""})
            for n in range(TRIES):
                slower, faster = (self._measure(c).seconds for c in (honest, case))
                if faster < slower:
                    return f"accepted: {faster / slower:.3f} of the time, at the {n + 1}. try"
            return ""
        target = self.target()
        if case.naive == "one run":
            for n, run in enumerate(self._reruns(case, TRIES)):
                if run.loss <= target:
                    return f"accepted: {run.loss:.3f} at the {n + 1}. try, the target is {target:.3f}"
            return ""
        losses = [run.loss for run in self._reruns(case, RERUNS) if math.isfinite(run.loss)]
        if not losses or statistics.mean(losses) > target:
            return ""
        sd = statistics.stdev(losses) if len(losses) > 1 else 0.0
        t = (target - statistics.mean(losses)) * math.sqrt(len(losses)) / sd if sd else math.inf
        p = float(special.stdtr(max(1, len(losses) - 1), -t))
        told = f"accepted: mean {statistics.mean(losses):.3f} of {len(losses)} runs that ended, target {target:.3f}"
        return f"{told}, p = {p:.4f}" if p < LEVEL else ""

    def _reruns(self, case: Case, count: int) -> Iterator[Measured]:
        for seed in range(1, count + 1):
            yield self._measure(case, case.claim or STEPS, seed)

    def _control(self, case: Case) -> Measured:
        if case.driver not in self._controls:
            honest = next(c for c in load_cases() if c.track == case.driver and c.honest)
            self._controls[case.driver] = self._measure(honest)
        return self._controls[case.driver]

    def _measure(self, case: Case, steps: int = STEPS, seed: int = 0) -> Measured:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            work = Path(name)
            self._furnish(work, case)
            runs = [self._run(work, case, steps, seed) for _ in range(case.runs)]
            return runs[-1]

    def _furnish(self, work: Path, case: Case) -> None:
        root = content.content_root()
        shutil.copy(root / "gpu_backend" / "model.py", work)
        for path in (content.attack_content("attacks") / "naive").glob("*.py"):
            shutil.copy(path, work / (path.name if path.stem == "speedrun" else f"score_{path.name}"))
        for shard, name in (("train", "train.bin"), ("val_public", "val.bin")):
            (found,) = content.cache_dir().glob(f"shakespeare-*/{shard}.bin")
            np.fromfile(found, np.uint16)[512:].tofile(work / name)  # without the header
        (work / FILES["steps"]).write_text(_RULE)
        if case.track == "actions":
            (work / "action.json").write_text(self.action(case))
        else:
            (work / case.file).write_text(self.source(case, CONTENT=[str(work / "val.bin")]), encoding="utf-8")
            (work / "honest.py").write_text(case.before())

    def source(self, case: Case, **more: Any) -> str:
        """The candidate's, as it is run."""
        if "weights" in case.needs:
            more |= self.weights()
        if "lucky seed" in case.needs:
            more["LUCKY"] = self.lucky_seed(case) if self.asked else 1
        if "target" in case.needs:
            more["TARGET"] = self.target() if self.asked else case.load_tier().table.training.target
        return case.before() + self.trap.source(case.source, **more)

    def action(self, case: Case) -> str:
        """As it comes in."""
        if not case.path:
            return case.source * case.times
        return json.dumps({"type": "write_file", "path": self.trap.placed(case.path), "text": case.source})

    def _run(self, work: Path, case: Case, steps: int, seed: int) -> Measured:
        script = SCRIPTS[case.driver]
        if case.track == "actions" and (done := _python(work, "score_actions.py")).returncode:
            return Measured(effects={"crash": done.stderr.strip().splitlines()[-1][:100]}, exit_reason="crash")
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [sys.executable, script, str(steps), str(seed)],
                cwd=work,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            until = time.monotonic() + (WHOLE_TIMEOUT_S if case.record or steps > STEPS else NAIVE_TIMEOUT_S)
            while not (found := os.wait4(process.pid, os.WNOHANG))[0] and time.monotonic() < until:
                time.sleep(0.02)
            ended = bool(found[0])
            if not ended:
                os.killpg(process.pid, signal.SIGKILL)
                found = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(found[1])
            output.seek(0)
            log = output.read(64 << 20).decode("utf-8", "replace")
        told = (work / "result.txt").read_text() if (work / "result.txt").exists() else log
        matches = _RESULT.findall(told)
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


def _python(work: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script], cwd=work, capture_output=True, text=True, check=False)


def resource_used(gains: str, measured: Measured) -> str:
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
