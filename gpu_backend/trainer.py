"""Train one candidate for real: owns model, batches, forward, backward, evaluation and seeds.

One process serves one run. It starts the sandbox and loads torch, then takes a job, one JSON line on standard
input. It answers on standard output with JSON lines: `progress` events and at last one `result`. A further line on
standard input, or its end, cancels the run. Warm ones are forked (forkserver.py).

    python trainer.py [--track steps|wallclock] [--sandbox auto|bubblewrap|plain] [--hide FOLDER]...
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import host
import sandbox
from logs import BoundedLog
from process import Process, SandboxError, adopt_orphans

HERE = Path(__file__).resolve().parent
CONTENT = HERE.parent  # envs/, records and corpora lie here: no candidate may see it


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every run needs. The shards in `final_shards` are evaluated at the end."""

    model: dict[str, Any]
    corpus: str
    cache: str
    seed: str
    limits: dict[str, Any]
    train_shards: list[str]
    final_shards: list[str]
    cores: list[int]
    gpus: int = 0
    gpu_ids: list[str] = field(default_factory=list)
    """that the candidate has to itself"""

    def __post_init__(self) -> None:
        if not self.final_shards:
            raise ValueError("final_shards must name at least one shard")

    def stream_seed(self, name: str) -> int:
        """63 bits for one purpose; no purpose's seed tells anything about another's."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class StepsJob(Job):
    """An update rule to train with. At the steps in `points` and at the end, `point_tokens` tokens of the first
    shard in `final_shards` are evaluated as well."""

    source: str
    batch_size: int
    steps: int
    horizon: int
    points: list[int]
    point_tokens: int
    ranks: int = 1
    """processes that train together; each takes its share of the batch and of the shards"""
    shards: int = 1
    """sets of parameters that are updated without sight of each other"""
    micro_batch: int = 0
    """rows at a time, whose gradients are accumulated; 0: all of a rank's"""
    numbers: str = "fp32"
    """or bf16, by autocast"""
    compile: bool = False
    """the model, by torch.compile"""
    save_every: int = 0
    """steps after which the run is saved, to go on if it is killed; 0: never"""
    exchange: str = ""
    """device where the rule has its own copy of what is exchanged; none: it works on the shared memory"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks < 1 or self.batch_size % self.ranks or self.shards % self.ranks:
            raise ValueError(f"{self.ranks} ranks cannot share {self.batch_size} rows and {self.shards} shards evenly")
        if self.save_every < 0:
            raise ValueError("save_every must not be negative")
        if len(self.gpu_ids) not in (0, self.ranks):
            raise ValueError(f"{self.ranks} ranks cannot have {len(self.gpu_ids)} GPUs: one each, or none")
        if self.numbers not in ("fp32", "bf16") or self.micro_batch < 0:
            raise ValueError(f"need fp32 or bf16 and micro_batch >= 0, not {self.numbers} and {self.micro_batch}")
        if self.steps < 1 or self.horizon < self.steps:
            raise ValueError(f"steps must be at least 1 and at most the horizon, got {self.steps} of {self.horizon}")


@dataclass(frozen=True, kw_only=True)
class WallclockJob(Job):
    """Training code to run, on at most `tokens` training tokens, `max_batch_tokens` at a time. `model_rule` 'free':
    sources have a `model.py` as well, whose answers are audited (`audit`: an `AuditRules`)."""

    sources: dict[str, str]
    tokens: int
    max_batch_tokens: int
    model_rule: str = "fixed"
    audit: dict[str, Any] | None = None
    compile_s: float = 0.0
    """seconds of a process before the timed one, which inherits its cache of compiled code and nothing else; 0: none"""
    cache_bytes: int = 0
    """of that cache, packed"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_batch_tokens <= self.tokens:
            raise ValueError("need 1 <= max_batch_tokens <= tokens")
        if self.model_rule not in ("fixed", "free"):
            raise ValueError(f"model_rule must be 'fixed' or 'free', not {self.model_rule!r}")
        if self.compile_s < 0 or (self.compile_s > 0) != (self.cache_bytes > 0):
            raise ValueError("compile_s and cache_bytes are both positive, or both 0")
        if (self.model_rule == "free") != (self.audit is not None):
            raise ValueError("an audit belongs to model_rule 'free', and only to it")
        for name in ("train.py", "model.py") if self.audit else ("train.py",):
            if name not in self.sources:
                raise ValueError(f"sources must have a {name}")


@dataclass(frozen=True)
class Track:
    job: type[Job]
    host: str
    """what runs the candidate, in its sandbox"""


TRACKS = {"steps": Track(StepsJob, "rule_host.py"), "wallclock": Track(WallclockJob, "train_host.py")}


@dataclass
class Result:
    """Measured by this process; only `log` is the candidate's. Times in seconds, losses in nats per token."""

    exit_reason: str = "completed"
    detail: str = ""
    train_losses: list[float] = field(default_factory=list)
    val_points: list[tuple[int, float]] = field(default_factory=list)
    val_losses: dict[str, float] = field(default_factory=dict)
    audits: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    flops: int = 0
    device_seconds: float = 0.0
    train_seconds: float = 0.0
    rule_time_ratio: float = 0.0
    trainer_peak_bytes: int = 0
    candidate_peak_bytes: int = 0
    log: str = ""
    sandbox: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)


class Cancel:
    """Set when the caller closes or writes to standard input; kills the candidate at once. With `last` it ends this
    process, too: a further rank, whose first has ended."""

    def __init__(self, process: Process, last: bool = False) -> None:
        self.process, self.called, self.last = process, False, last

    def watch(self) -> None:
        sys.stdin.readline()
        self.called = True
        self.process.stop()
        if self.last:
            os._exit(1)  # it may be waiting for ranks that are gone

    def now(self, process: Process) -> Process:
        """From here on this is the candidate's process."""
        self.process = process
        if self.called:
            process.stop()
        return process


def emit(event: str, **fields: Any) -> None:
    try:
        print(json.dumps({"event": event, **fields}), flush=True)
    except BrokenPipeError:  # the caller is gone; Cancel ends the run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


Launch = Callable[[int, str], Process]
"""Starts a process for a candidate, whose output goes to the given descriptor, with the given host script. Raises
`SandboxError`."""


def run(job: Job, process: Process, log: BoundedLog, cancel: Cancel, launch: Launch, ranks: Any = None) -> Result:
    """Train and evaluate. Candidate faults and cancellation end in a `Result`, never an exception. Further processes
    of the candidate are started by `launch`: of a free model's evaluation, or the timed one after one that compiled."""
    from candidate import RunFailed
    from checkpoint import CheckpointError

    started = time.monotonic()
    result = Result(sandbox=asdict(process.info), versions=_versions(), hardware=_hardware(job))

    def further(log_fd: int, host: str) -> Process:
        started = cancel.now(launch(log_fd, host))
        started.pin(job.cores)
        return started

    setting = _setting(job, result, cancel, further, ranks)  # what it raises is the job's fault, no candidate's
    try:
        trained = setting.train(process, lambda: emit("progress", **_progress(job, result)))
        process.kill()  # before the final evaluation: nothing of the candidate is alive in it
        emit("progress", **_progress(job, result), evaluating=True)
        setting.evaluate_all(trained)
    except RunFailed as failure:
        result.exit_reason, result.detail = failure.reason, str(failure)
    except CheckpointError as refusal:
        result.exit_reason, result.detail = "checkpoint_refused", str(refusal)
    except Exception as error:
        # Once candidate code has run, a fault of ours counts against it: it may know how to cause one, and a
        # rerun that is void when it goes badly would be a free choice among seeds.
        traceback.print_exc()
        result.exit_reason, result.detail = "trainer_error", f"the trainer failed: {type(error).__name__}"
    try:
        process.kill()
    except (OSError, subprocess.TimeoutExpired) as error:  # its fault too: it may know how to outlive us
        result.exit_reason, result.detail = "trainer_error", f"the candidate could not be ended: {type(error).__name__}"
    if cancel.called:
        result.exit_reason, result.detail = "cancelled", "the run was cancelled"
    result.log = log.text() + result.log
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    if job.gpu_ids:
        import torch

        result.hardware["trainer_gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
    result.trainer_peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    result.device_seconds += (time.monotonic() - started) * max(1, len(job.gpu_ids))
    return result


def _setting(job: Job, result: Result, cancel: Cancel, launch: Launch, ranks: Any) -> Any:
    from timed import Timed
    from training import Training

    if isinstance(job, StepsJob):
        return Training(job, result, lambda: cancel.called, ranks)
    assert isinstance(job, WallclockJob)
    return Timed(job, result, lambda: cancel.called, launch)


@contextlib.contextmanager
def _ranks(job: Job, line: str, arguments: list[str] | None, rank: int, store: str) -> Iterator[Any]:
    """This rank of the run's; the first starts the others."""
    import ranks

    size = job.ranks if isinstance(job, StepsJob) else 1
    with contextlib.ExitStack() as stack:
        if size > 1 and rank == 0:
            if arguments is None:
                raise ValueError("a run of several ranks needs a cold start")
            store = stack.enter_context(ranks.others(size, arguments, line))
        mine = ranks.Ranks(rank, size, store, job.limits["deadline_s"])
        stack.callback(mine.close)
        yield mine


def _progress(job: Job, result: Result) -> dict[str, Any]:
    if isinstance(job, StepsJob):
        loss = result.train_losses[-1] if result.train_losses else math.nan
        return {"done": result.steps, "total": job.steps, "train_loss": loss if loss == loss else None}
    assert isinstance(job, WallclockJob)
    return {"done": result.tokens, "total": job.tokens, "train_loss": None}


def _versions() -> dict[str, str]:
    import numpy
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _hardware(job: Job) -> dict[str, Any]:
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": name, "cores": os.cpu_count(), "simd": capability, "threads": 1}
    if job.gpu_ids:
        if not torch.cuda.is_available():
            raise ValueError("the run has GPUs, and the torch that is installed here cannot use them")
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found | ({"devices": job.ranks, "numbers": job.numbers} if isinstance(job, StepsJob) else {})


def preload() -> None:
    """What takes long, whatever the job."""
    import safetensors.torch  # noqa: F401
    import torch

    import timed  # noqa: F401
    import training  # noqa: F401

    host.keep_freed_memory()
    torch.set_num_threads(1)


def serve(track: Track, launch: Launch, arguments: list[str] | None = None, rank: int = 0, store: str = "") -> int:
    """One run: the job from standard input, events to standard output. The exit code. `arguments`: those that further
    ranks of the run are started with; None where they cannot be. `rank`, `store`: of a further rank."""
    # the job's, whatever the locale; typeshed does not know that it is a TextIOWrapper
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    log = BoundedLog()
    try:
        process = launch(log.write_fd, track.host)
    except SandboxError as error:
        emit("error", message=str(error))
        return 3
    log.close_writer()
    try:
        preload()
        line = sys.stdin.readline()
        if not line:
            return 0  # nothing to do after all
        try:
            job = track.job(**json.loads(line))
        except (TypeError, ValueError) as error:
            emit("error", message=f"not a valid job: {error}")
            return 2
        try:
            process.wait_loaded()
        except SandboxError as error:
            emit("error", message=f"{error}\n{log.text()[-2000:]}".strip())
            return 3
        cancel = Cancel(process, last=rank > 0)
        threading.Thread(target=cancel.watch, daemon=True).start()
        try:
            with _ranks(job, line, arguments, rank, store) as ranks:
                result = run(job, process, log, cancel, launch, ranks)
        except (ValueError, OSError) as error:  # our own configuration or data, not the candidate
            emit("error", message=str(error))
            return 2
        emit("result", **asdict(result))
        return 0
    finally:
        process.kill()
        process.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sandbox", default="auto", choices=sandbox.CHOICES)
    parser.add_argument("--track", default="steps", choices=list(TRACKS))
    parser.add_argument("--hide", action="append", default=[], help="folder no candidate may see")
    parser.add_argument("--note", default="", help="for the results, about the sandbox")
    parser.add_argument("--gpu", action="append", default=[], help="device that the candidate gets")
    parser.add_argument("--rank", type=int, default=0, help="of a run that several trainers share")
    parser.add_argument("--store", default="", help="file by which they find each other")
    args = parser.parse_args()
    adopt_orphans()
    hidden = [CONTENT, *(Path(p).resolve() for p in args.hide)]

    gpus = args.gpu[args.rank : args.rank + 1] if args.track == "steps" else args.gpu  # of update rules one a rank
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)

    def launch(log_fd: int, host: str) -> Process:
        return sandbox.launch(args.sandbox, hidden, log_fd, host, args.note, tuple(gpus))

    return serve(TRACKS[args.track], launch, sys.argv[1:], args.rank, args.store)


if __name__ == "__main__":
    sys.exit(main())
