"""A scripted backend: the units under test are sequencing and accounts, so no training is needed."""

import contextlib

from nanogpt_env.errors import BackendError
from nanogpt_env.types import Progress, RunResult, SandboxInfo

LOST = BackendError("node lost")


def ran(job, loss, seconds=1.0, *, reason="completed", detail="", trusted=True, **changes):
    """What a run of `job` yields whose loss falls to `loss` at its end, by 0.01 nat a step."""
    done = job.steps if reason == "completed" else job.steps // 2
    tokens = done * job.batch_size * job.model["seq_len"]
    points = tuple((s, loss + 0.01 * (done - s)) for s in (*(p for p in job.points if p < done), done) if s)
    fields = {
        "exit_reason": reason,
        "detail": detail,
        "train_losses": tuple(loss + 0.01 * (done - s) for s in range(done)),
        "val_points": points,
        "val_losses": dict.fromkeys(job.final_shards, loss) if reason == "completed" else {},
        "steps": done,
        "tokens": tokens,
        "flops": 1000 * tokens,
        "device_seconds": seconds,
        "sandbox": SandboxInfo(name="fake", version="1", trusted=trusted),
        "versions": {"torch": "0"},
        "hardware": {"cpu": "none"},
    }
    return RunResult(**(fields | changes))


class FakeRun:
    """Ends at once, or when it is released or cancelled if it is `held`."""

    def __init__(self, job, outcome, held):
        self.job, self.outcome, self.held = job, outcome, held
        self.cancelled = self.delivered = False

    def progress(self):
        return Progress(done=1, total=self.job.steps) if self.held else None

    def done(self):
        return not self.held

    def result(self, timeout=None):
        if self.held:
            assert timeout is not None, "this would wait for ever"
            raise TimeoutError
        self.delivered = True
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self):
        self.cancelled = True
        if self.held:
            self.held = False
            self.outcome = ran(self.job, 9.0, 0.25, reason="cancelled")


class FakeBackend:
    """`script(job, number)` says what the numbered start (from 1) ends in: a loss, a RunResult or an
    exception; or it raises. Starts numbered in `hold` wait."""

    def __init__(self, script=lambda job, number: 4.5, hold=()):
        self.script, self.hold = script, set(hold)
        self.runs = []
        self.most_at_once = 0
        self.sessions = 0
        self.closed = 0

    @property
    def jobs(self):
        return [run.job for run in self.runs]

    def start(self, job, share=False):
        number = len(self.runs) + 1
        run = FakeRun(job, None, number in self.hold)
        self.runs.append(run)
        self.most_at_once = max(self.most_at_once, sum(not r.delivered for r in self.runs))
        outcome = self.script(job, number)
        run.outcome = ran(job, outcome) if isinstance(outcome, float) else outcome
        return run

    def exclusive(self, on_wait=lambda: None):
        self.sessions += 1
        return contextlib.nullcontext()

    def close(self):
        self.closed += 1
        for run in self.runs:
            run.cancel()


def hidden_losses(losses, public=4.5):
    """A script: verification's reruns end in `losses` one after the other, other runs in `public`."""
    rest = iter(losses)
    return lambda job, number: next(rest) if job.final_shards == ("val_hidden",) else public
