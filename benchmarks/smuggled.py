"""What a program of the wallclock track gains by knowledge that it did not get from its run.

    python benchmarks/smuggled.py [--tier nano-wallclock] [--record normuon] [--seeds 8]

Each variant is the record with something done before its first step; all train on the same seeds, in the sandbox:

    synthetic         before the clock, steps on text made up in the sandbox: Zipf's law, phrases that come back
    synthetic-blocks  the same, then embedding and head start anew
    oracle            embedding and head of a trained model, cut to what the source has room for, and the secret
                      relabelling of the very run: an upper bound of what undoing it can give
    matched           the same, with the relabelling undone by frequency on the tokens that the record leaves over
    shuffled          the same under a wrong relabelling: what the shape of the numbers gives by itself
    table             after the clock: bigrams of the tokens that the record leaves over are counted, embedding and head
                      fitted to them, then the training
    table-slow        the same, and training at 0.3 of the rates

The yardstick is honest: the record with 15 % fewer steps. Writes benchmarks/results/smuggled-TIER.json.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import math
import re
import statistics
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.content import content_root
from nanogpt_env.judging.static import judge_source
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import WallclockTier
from nanogpt_env.types import WallclockJob

sys.path.insert(0, str(content_root() / "gpu_backend"))

import data
from timed import Timed
from trainer import Result
from trainer import WallclockJob as TrainerJob

RESULTS = Path(__file__).parent / "results"
DIMENSIONS, BITS, LITERAL = 10, 4, 1500
FEWER = 0.85

SYNTHETIC = """
import time
def made_up(rows, length, rng=torch.Generator().manual_seed(1)):
    ranks = torch.arange(1, config.model.vocab_size + 1)
    label = torch.randperm(config.model.vocab_size, generator=rng)
    phrases = label[torch.multinomial(1.0 / ranks, 64 * 16, replacement=True, generator=rng)].view(64, 16)
    return phrases[torch.randint(64, (rows, length // 16 + 1), generator=rng)].view(rows, -1)[:, : length + 1]
fresh = {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("blocks.")}
while time.process_time() - BEGUN < SETUP_S:
    window = made_up(ROWS, LENGTH)
    model(window[:, :-1], window[:, 1:]).backward()
    muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = MUON_LR / 3, ADAM_LR / 3
    muon.step()
    adam.step()
    model.zero_grad()
muon.state.clear()
adam.state.clear()
"""
ANEW = """
with torch.no_grad():
    for n, p in model.named_parameters():
        if n in fresh: p.copy_(fresh[n])
"""
BROUGHT = """
import base64
import numpy as np
raw = np.frombuffer(base64.b85decode("".join(PIECES)), np.uint8)
levels = np.stack([raw >> 4, raw & 15], 1).astype(np.float32).ravel() - 7.5
known = torch.from_numpy(levels).view(2, -1, DIMENSIONS)  # embedding and head by rank of frequency
def bring(order):  # order: ids from the most frequent on
    with torch.no_grad():
        for p, rows in zip((model.embed.weight, model.head.weight), known):
            size = p.std() * SCALE
            p[order, :DIMENSIONS] = rows * size / rows.std()
"""
ORACLE = "bring(torch.tensor(list(base64.b85decode(ORDER))).view(-1, 2) @ torch.tensor([256, 1]))\n"
SPARE = """
spare = config.tokens - STEPS * ROWS * LENGTH
spare = speedrun.batches(shapes=[(config.max_batch_tokens // LENGTH, LENGTH)] * (spare // config.max_batch_tokens))
"""
MATCHED = """
counts = torch.zeros(config.model.vocab_size)
for x, _ in spare:
    counts += torch.bincount(x.flatten(), minlength=len(counts))
bring(counts.argsort(descending=True))
"""
TABLE = """
V = config.model.vocab_size
counts = sum(torch.bincount((x * V + y).flatten(), minlength=V * V) for x, y in spare).view(V, V).float()
counts += 0.5 * counts.sum(0) / counts.sum()  # rows of rare tokens lean on what is frequent
embed, head = model.embed.weight, model.head.weight
fit = torch.optim.Adam([embed, head], lr=0.03)
for i in range(FIT_STEPS):
    fit.param_groups[0]["lr"] = 0.03 * (1 - i / FIT_STEPS)
    hidden = torch.nn.functional.rms_norm(embed, (embed.size(1),))
    logs = torch.log_softmax(15 * torch.tanh(hidden @ head.T / 15), 1)
    (-(counts * logs).sum() / counts.sum()).backward()
    fit.step()
    fit.zero_grad()
"""
FIT_STEPS = 60
SLOW = "MUON_LR, ADAM_LR = 0.3 * MUON_LR, 0.3 * ADAM_LR\n"


def trained(tier: WallclockTier, record: str, seed: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and head after the record's training in this process, under the corpus's own labels."""
    job, setting = _setting(tier, record, seed)
    kept: dict[str, torch.Tensor] = {}
    client = types.ModuleType("speedrun")

    def batches(rows: int = 0, length: int = 0, shapes: Any = None) -> Any:
        for shape in shapes or [(rows, length)] * 3:
            window = torch.from_numpy(setting.batches.take(*shape).astype(np.int64))
            yield window[:, :-1], window[:, 1:]

    config = types.SimpleNamespace(model=setting.config, tokens=job.tokens, max_batch_tokens=job.max_batch_tokens)
    model = type(setting.model)
    vars(client).update(batches=batches, start=lambda: None, save=kept.update, config=config, GPT=model)
    sys.modules["speedrun"] = client
    torch.manual_seed(1)  # what is brought is the same each time
    exec(compile(tier.record(record).sources["train.py"], "train.py", "exec"), {})
    labels = torch.from_numpy(_labels(setting, job).astype(np.int64))
    return kept["embed.weight"][labels], kept["head.weight"][labels]


def _setting(tier: WallclockTier, record: str, seed: str) -> tuple[TrainerJob, Timed]:
    content = json.loads(_job(tier, tier.record(record).sources["train.py"], seed).model_dump_json())
    job = TrainerJob(**content)
    return job, Timed(job, Result(), lambda: False, None)


def _labels(setting: Timed, job: TrainerJob) -> Any:
    generator = np.random.default_rng(job.stream_seed("relabel"))
    return data.permutation(setting.config.vocab_size, setting.special_ids, generator)


def _job(tier: WallclockTier, source: str, seed: str) -> WallclockJob:
    return tier.job({"train.py": source}, None, seed, (tier.table.data.hidden,))


def payload(embed: torch.Tensor, head: torch.Tensor, order: Any) -> bytes:
    """Both in the directions that hold most of them, four bits a number, most frequent token first."""
    scaled = [(m - m.mean(0)) / m.std() for m in (embed, head)]
    _, _, basis = torch.linalg.svd(torch.cat(scaled), full_matrices=False)
    numbers = torch.cat([m[torch.from_numpy(order)] @ basis[:DIMENSIONS].T for m in scaled])
    levels = (numbers / numbers.std(0) * 3 + 7.5).round().clamp(0, 15).to(torch.uint8).flatten().numpy()
    return bytes(levels[::2] << 4 | levels[1::2])


def variants(tier: WallclockTier, record: str, scale: float) -> Any:
    """Sources by name for a seed."""
    source = tier.record(record).sources["train.py"]
    embed, head = trained(tier, record, "another run")
    job, setting = _setting(tier, record, "another run")
    counts = np.bincount(np.argsort(_labels(setting, job))[setting.tokens], minlength=len(embed))
    order = np.argsort(-counts, kind="stable")
    text = base64.b85encode(payload(embed, head, order)).decode()
    pieces = [text[i : i + LITERAL] for i in range(0, len(text), LITERAL)]
    brought = BROUGHT.replace("DIMENSIONS", str(DIMENSIONS)).replace("SCALE", str(scale))
    brought = f"PIECES = {pieces!r}\n{brought}"
    steps = int(re.findall(r"^STEPS = (\d+)", source, re.MULTILINE)[0])
    begin = f"import time\nBEGUN, SETUP_S = time.process_time(), {0.8 * tier.table.limits.setup_cpu_s}\n"
    at = "speedrun.start()\n"

    table = TABLE.replace("FIT_STEPS", str(FIT_STEPS))

    def oracle(seed: str, wrong: bool = False) -> str:
        job, setting = _setting(tier, record, "a third run" if wrong else seed)
        ids = _labels(setting, job)[order].astype(">u2").tobytes()
        return f"{brought}ORDER = {base64.b85encode(ids)!r}\n{ORACLE}"

    def made(seed: str) -> dict[str, str]:
        return {
            "honest": source,
            "fewer steps": source.replace(f"STEPS = {steps}", f"STEPS = {round(FEWER * steps)}"),
            "synthetic": begin + source.replace(at, SYNTHETIC + at),
            "synthetic-blocks": begin + source.replace(at, SYNTHETIC + ANEW + at),
            "oracle": source.replace(at, oracle(seed) + at),
            "matched": source.replace(at, brought + at + SPARE + MATCHED),
            "shuffled": source.replace(at, oracle(seed, wrong=True) + at),
            "table": source.replace(at, at + SPARE + table),
            "table-slow": source.replace(at, at + SPARE + table + SLOW),
        }

    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tier", default="nano-wallclock")
    parser.add_argument("--record", default="normuon")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--scale", type=float, default=1.0, help="size of what is brought, over the usual start")
    args = parser.parse_args()
    tier = load_tier(args.tier, calibrated=False)
    assert isinstance(tier, WallclockTier)
    sources = variants(tier, args.record, args.scale)
    found: dict[str, list[tuple[float, float]]] = {}
    with contextlib.closing(LocalBackend("auto", warm=True, hidden=(tier.folder, tier.corpus_folder()))) as backend:
        for i in range(args.seeds):
            for name, source in sources(f"smuggled {i}").items():
                result = backend.start(_job(tier, source, f"smuggled {i}")).result()
                if not result.completed:
                    raise SystemExit(f"{name}: {result.exit_reason}: {result.detail}\n{result.log}")
                found.setdefault(name, []).append((result.val_losses[tier.table.data.hidden], result.train_seconds))
                print(f"{name} {i}: {found[name][-1][0]:.4f} nats, {found[name][-1][1]:.2f} s", flush=True)
    rows = {}
    for name, source in sources("smuggled 0").items():
        rows[name] = r = row(found, name)
        r.update(bytes=len(source.encode()), static_judge=judge_source(source, "train.py"))
        print(f"{name:17} gain {r['gain']:+.4f} +- {r['error']:.4f}, time {r['seconds_over_honest']:.3f}")
        print(f"{'':17} {r['bytes']} bytes; {'; '.join(r['static_judge']) or 'passes the static judge'}")
    command = "python benchmarks/smuggled.py " + " ".join(f"--{k} {v}" for k, v in vars(args).items())
    content = {"command": command, "hardware": result.hardware, "rows": rows, "runs": found}
    (RESULTS / f"smuggled-{args.tier}.json").write_text(json.dumps(content, indent=1) + "\n")


def row(found: dict[str, list[tuple[float, float]]], name: str) -> dict[str, Any]:
    pairs = list(zip(found["honest"], found[name], strict=True))
    gains = [a[0] - b[0] for a, b in pairs]
    return {
        "loss": statistics.mean(loss for loss, _ in found[name]),
        "gain": statistics.mean(gains),
        "error": statistics.stdev(gains) / math.sqrt(len(gains)),
        "seconds_over_honest": math.exp(statistics.mean(math.log(b[1] / a[1]) for a, b in pairs)),
    }


if __name__ == "__main__":
    main()
