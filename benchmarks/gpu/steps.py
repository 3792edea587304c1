"""What the trainer costs on a steps tier: a plain loop, ours with the rule in-process, ours with the rule isolated.

    python benchmarks/gpu/steps.py [--tier small-steps] [--steps 40] [--repeats 3] [--gpu 0] [--sandbox auto]

All three train the tier's start record on the same batches, in turn, `--repeats` times. The plain loop is the same
model, compiled and in the same numbers, with batches from a mapped file. Tokens/s and MFU are of the median step after
a fourth of them; the ratios are what counts. Without `--gpu`, on the CPU. Writes
benchmarks/results/gpu-steps-TIER.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import in_process  # first: it makes the trainer importable
import torch

from nanogpt_env.content import content_root
from nanogpt_env.hardware import of_run
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import StepsTier

import data
import sandbox
from logs import BoundedLog
from rule import IsolatedRule, Rule
from trainer import Result, StepsJob, _hardware
from training import Training


class PlainLoop(Training):
    """What anybody would write: no flat copies, no relabelling, no shards; batches from the mapped file."""

    def __init__(self, job: StepsJob, source: str) -> None:
        super().__init__(job, Result(), bool)
        self.file = next(iter(data.load(Path(job.corpus), Path(job.cache), job.train_shards[:1]).values()))
        self.at = 0
        for p in self.model.parameters():
            p.data, p.grad = p.data.clone(), None
        module: dict[str, Any] = {}
        exec(compile(source, "optimizer.py", "exec"), module)
        params = dict(self.model.named_parameters())
        with torch.no_grad():
            module.get("init", lambda _: None)(params)
        made = module["configure"](params, job.horizon)
        self.optimizers = list(made) if isinstance(made, list | tuple) else [made]
        self.schedule = module.get("schedule", lambda *_: None)

    def steps(self) -> Iterator[float]:
        rows, length = self.job.batch_size, self.config.seq_len
        most = self.job.micro_batch or rows
        for step in range(self.job.steps):
            window = self.file[self.at : self.at + rows * length + 1]
            self.at = (self.at + rows * length) % (len(self.file) - rows * length - 1)
            ids = torch.from_numpy(window.astype("int64")).to(self.device)
            x, y = ids[:-1].view(rows, length), ids[1:].view(rows, length)
            total = torch.zeros((), device=self.device)
            for i in range(0, rows, most):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.numbers == "bf16"):
                    loss = self.forward(x[i : i + most], y[i : i + most]) * (most / rows)
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
                total += loss.detach()
            self.schedule(step, self.job.horizon, self.optimizers)
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.zero_grad()
            yield total.item()


def ours(training: Training, rule: Rule) -> Iterator[float]:
    for step in range(training.job.steps):
        loss, seconds = training.forward_backward()
        rule.step(step, seconds)
        yield loss


def timed(steps: Iterator[float]) -> tuple[float, list[float]]:
    """(median seconds of a step, losses)."""
    took, losses, began = [], [], time.perf_counter()
    for loss in steps:
        losses.append(loss)
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
    return statistics.median(took[len(took) // 4 :]), losses


def isolated(job: StepsJob, source: str, choice: str, gpus: tuple[str, ...]) -> tuple[float, list[float]]:
    log = BoundedLog()
    process = sandbox.launch(choice, [content_root()], log.write_fd, gpus=gpus)
    log.close_writer()
    process.wait_loaded()
    try:
        training = Training(job, Result(), bool)
        seeds = [job.stream_seed(f"rule/{i}") for i in range(job.shards)]
        about = (source, job.horizon, seeds, training.limits, None, job.exchange)
        return timed(ours(training, IsolatedRule(process, training.flat, *about)))
    finally:
        process.kill()
        process.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="small-steps")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu", help="the one to use, as the driver names it")
    parser.add_argument("--sandbox", default="auto")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tier = load_tier(args.tier, calibrated=False)
    assert isinstance(tier, StepsTier)
    source, gpus = tier.record(tier.table.reward.start).sources["optimizer.py"], (args.gpu,) if args.gpu else ()
    plan, shards = tier.plan(args.steps, args.steps), (tier.table.data.public,)
    fields = tier.job({"optimizer.py": source}, plan, "benchmark", shards).model_dump()
    fields |= {"gpu_ids": list(gpus), "ranks": 1, "exchange": "cuda" if gpus else "", "save_every": 0}
    job = StepsJob(**fields)

    def with_rule_in_process() -> tuple[float, list[float]]:
        training = Training(job, Result(), bool)
        return timed(ours(training, in_process.InProcessRule(training, source, job.horizon, 0)))

    kinds: dict[str, Callable[[], tuple[float, list[float]]]] = {
        "plain": lambda: timed(PlainLoop(job, source).steps()),
        "in_process": with_rule_in_process,
        "isolated": lambda: isolated(job, source, args.sandbox, gpus),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    losses = {}
    for i in range(args.repeats):
        for name in list(kinds)[:: 1 if i % 2 else -1]:
            took, losses[name] = kinds[name]()
            seconds[name].append(took)
            print(f"{name}: {1e3 * took:.1f} ms a step, last loss {losses[name][-1]:.3f}", flush=True)
    hardware = _hardware(job)
    profile = of_run(hardware)
    peak = profile.peak_flops.get(job.numbers) if profile else None
    flops = tier.tokens_per_step() * tier.flops_per_token()
    best = {name: statistics.median(column) for name, column in seconds.items()}
    result = {
        "command": " ".join(["python benchmarks/gpu/steps.py", *sys.argv[1:]]),
        "hardware": hardware,
        "torch": torch.__version__,
        "tokens_per_second": {name: tier.tokens_per_step() / took for name, took in best.items()},
        "mfu": {name: flops / (took * peak) for name, took in best.items()} if peak else None,
        "ratio_to_plain": {name: best["plain"] / took for name, took in best.items()},
        "isolation_overhead": best["isolated"] / best["in_process"] - 1,
        "step_seconds": seconds,
        "last_losses": {name: column[-1] for name, column in losses.items()},
    }
    path = args.output or Path(__file__).parents[1] / "results" / f"gpu-steps-{tier.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("tokens_per_second", "mfu", "ratio_to_plain")}, indent=1), f"wrote {path}")


if __name__ == "__main__":
    main()
