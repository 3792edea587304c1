"""What clock, data server and audit cost the start program of a wallclock tier with a free model.

    python benchmarks/gpu/wallclock.py [--tier small-wallclock] [--steps 100] [--repeats 3] [--gpu 0] [--sandbox auto]

The same train.py in turn: as a run, and as a plain process that maps the file and saves nothing. Then the evaluation
with the tier's number of audited positions and with two: what the audit costs, and how far the honest model's answers
are from the audited ones. MFU counts the tier's own model with full attention. Without `--gpu`, on the CPU. Writes
benchmarks/results/gpu-wallclock-TIER.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import types
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.content import content_root
from nanogpt_env.hardware import of_run
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import WallclockTier
from nanogpt_env.types import RunResult, WallclockJob

sys.path.insert(0, str(content_root() / "gpu_backend"))

import data
import host
from model import ModelConfig

SHOWN = ("tokens_per_second", "mfu", "ratio_to_plain", "audit_seconds")


def plain(job: WallclockJob) -> None:
    """The program in this process, with a client that maps the file: prints the seconds between start and save."""
    torch.set_num_threads(1)
    manifest = data.load_manifest(Path(job.corpus))
    tokens = next(iter(data.load(Path(job.corpus), Path(job.cache), job.train_shards[:1]).values()))
    clock: list[float] = []

    def batches(rows: int = 0, length: int = 0, shapes: Any = None, order: str = "") -> Any:
        at = 0
        for r, n in shapes or iter(lambda: (rows, length), None):
            if shapes and at == 0:
                clock.append(time.monotonic())
            window = torch.from_numpy(tokens[at : at + r * n + 1].astype("int64"))
            at = (at + r * n) % (len(tokens) - r * n - 1)
            yield window[:-1].view(r, n), window[1:].view(r, n)

    def save(state: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(f"plain {time.monotonic() - clock[0]}", flush=True)

    config = {"tokens": job.tokens, "max_batch_tokens": job.max_batch_tokens, "first_token": manifest.special_ids[0]}
    client: Any = types.ModuleType("speedrun")
    client.config = types.SimpleNamespace(**config, model=ModelConfig(**job.model))
    client.batches, client.save = batches, save
    client.declare, client.start, client.ranks = (lambda state: None), (lambda: None), (lambda count: 0)
    sys.modules["speedrun"] = client
    host.import_source("model", job.sources["model.py"])
    host.import_source("train", job.sources["train.py"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="small-wallclock")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu", help="the one to use, as the driver names it")
    parser.add_argument("--sandbox", default="auto")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plain", action="store_true", help="run the job on standard input, without a trainer")
    args = parser.parse_args()
    if args.plain:
        plain(WallclockJob.model_validate_json(sys.stdin.read()))
        return
    tier = load_tier(args.tier, calibrated=False)
    assert isinstance(tier, WallclockTier)
    assert tier.table.audit, "the tier's model must be free"
    job = tier.job(tier.record(tier.table.reward.start).sources, None, "benchmark", (tier.table.data.hidden,))
    gpus = (args.gpu,) if args.gpu else ()
    changes = {"tokens": args.steps * job.max_batch_tokens, "gpu_ids": gpus, "gpus": len(gpus)}
    job = job.model_copy(update=changes)
    few = job.model_copy(update={"audit": tier.table.audit.model_copy(update={"positions": 2})})
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    runs: list[RunResult] = []
    seconds: dict[str, list[float]] = {"plain": [], "run": []}
    rest: dict[str, list[float]] = {"audited": [], "two positions": []}
    with closing(LocalBackend(args.sandbox)) as backend:
        for _ in range(args.repeats):
            command = [sys.executable, __file__, "--plain"]
            done = subprocess.run(
                command, input=job.model_dump_json(), env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            seconds["plain"].append(float(done.stdout.split("plain ")[1]))
            for name, one in (("audited", job), ("two positions", few)):
                result = backend.start(one).result()
                assert result.completed, f"{result.exit_reason}: {result.detail}\n{result.log}"
                seconds["run"].append(result.train_seconds)
                rest[name].append(result.device_seconds - result.train_seconds)
                runs.append(result)
            print({name: round(column[-1], 3) for name, column in (seconds | rest).items()}, flush=True)
    found = {name: statistics.median(column) for name, column in seconds.items()}
    profile = of_run(runs[0].hardware)
    peak = profile.peak_flops.get("bf16" if gpus else "fp32") if profile else None
    flops = job.tokens * tier.flops_per_token()
    audits = [run.audits[tier.table.data.hidden] for run in runs]
    told = {
        "command": " ".join(["python benchmarks/gpu/wallclock.py", *sys.argv[1:]]),
        "hardware": runs[0].hardware,
        "torch": torch.__version__,
        "tokens_per_second": {name: job.tokens / took for name, took in found.items()},
        "mfu": {name: flops / (took * peak) for name, took in found.items()} if peak else None,
        "ratio_to_plain": found["plain"] / found["run"],
        "audit_seconds": statistics.median(rest["audited"]) - statistics.median(rest["two positions"]),
        "seconds": seconds | rest,
        "max_abs_d": max(audit.max_abs_d for audit in audits),
        "max_abs_mean_d": max(abs(audit.mean_d) for audit in audits),
        "losses": [audit.audited_loss for audit in audits],
    }
    path = args.output or Path(__file__).parents[1] / "results" / f"gpu-wallclock-{tier.name}.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps({key: told[key] for key in SHOWN}, indent=1), f"wrote {path}")


if __name__ == "__main__":
    main()
