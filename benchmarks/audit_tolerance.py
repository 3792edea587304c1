"""How far an honest model's audited answers are from its committed ones, and how often a tolerance refuses one.

    python benchmarks/audit_tolerance.py [--evaluations 12] [--sandboxed 1]

For each kind of model (numbers x attention x head, and torch.compile) a short training, then `--evaluations`
evaluations with weights perturbed by 2 %, each with its own positions, text and relabelling: a pass over 128 sequences
and an audit of 64 positions, by the trainer's own code. They run in this process, freshly built models standing for
fresh processes; `--sandboxed` of each kind are repeated in real sandboxes. `other_shape` is D when the audit asks row
by row, so that other kernels run. Writes benchmarks/results/audit-tolerance.json after
each kind; kinds that it has already, of as many evaluations, are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import in_process as in_process  # first: it makes the trainer importable
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nanogpt_env.content import cache_dir, content_root

import data
import eval_host
import free
import host
import process
import sandbox
from audit import Audit, AuditRules
from candidate import Limits

COMMAND = "python benchmarks/audit_tolerance.py"
SOURCE = (Path(__file__).parent / "honest_model.py").read_text()
SHAPE = free.Shape(rows=32, length=64, vocab=1024)
SEQUENCES, POSITIONS, TRAINING_STEPS, NOISE = 128, 64, 80, 0.02
NO_BOUND = AuditRules(POSITIONS, 1e9, 1e9, 1 << 22, 120.0)
TOLERANCE, MEAN_TOLERANCE = 1e-3, 1e-4
RESULTS = Path(__file__).parent / "results" / "audit-tolerance.json"
LIMITS = Limits(deadline_s=120, setup_s=60, stall_s=60, memory_bytes=1 << 31)


def kinds() -> list[dict[str, Any]]:
    numbers, attentions = ("fp32", "bf16 weights", "bf16 autocast"), ("full", "window", "documents")
    found = [
        {"numbers": n, "attention": a, "tied": t, "compiled": ""}
        for n, a, t in itertools.product(numbers, attentions, (True, False))
    ]
    return found + [{"numbers": n, "attention": "window", "tied": True, "compiled": "aot_eager"} for n in numbers]


def source_of(kind: dict[str, Any]) -> str:
    return f"{SOURCE}\nSETTINGS.update({kind!r})\n"


class InProcess:
    def __init__(self, model: eval_host.Model, one_by_one: bool) -> None:
        self.model, self.one_by_one = model, one_by_one

    def scores(self, windows: data.Tokens) -> free.Floats32:
        with torch.no_grad():
            return eval_host.scores(self.model, torch.from_numpy(windows.astype(np.int64)), SHAPE.vocab)

    def full_rows(self, windows: data.Tokens, positions: NDArray[np.uint32]) -> free.Floats32:
        ids, where = torch.from_numpy(windows.astype(np.int64)), positions.astype(np.int64)
        size = 1 if self.one_by_one else len(ids)
        with torch.no_grad():
            parts = [
                eval_host.full_rows(self.model, ids[i : i + size], where[i : i + size], SHAPE.vocab)
                for i in range(0, len(ids), size)
            ]
        return np.concatenate(parts)


Open = Callable[[], AbstractContextManager[free.Model]]


def here(kind: dict[str, Any], state: dict[str, Tensor], one_by_one: bool = False) -> Open:
    @contextmanager
    def opened() -> Iterator[free.Model]:
        model = host.import_source("honest", source_of(kind)).build({name: t.clone() for name, t in state.items()})
        yield InProcess(model, one_by_one)

    return opened


def sandboxed(kind: dict[str, Any], state: dict[str, Tensor]) -> Open:
    model = {"layers": 1, "width": 2, "heads": 1, "vocab_size": SHAPE.vocab, "seq_len": SHAPE.length}
    message = {"sources": {"model.py": source_of(kind)}, "model": model, "config": {}, "seed": 1}
    trial = np.zeros((SHAPE.rows, SHAPE.length + 1), np.uint16)
    content = safetensors.torch.save(state)

    def launch(log_fd: int) -> process.Process:
        return sandbox.launch("bubblewrap", [content_root()], log_fd, "eval_host.py")

    return lambda: free.in_sandbox(launch, lambda log: None, LIMITS, SHAPE, message, content, trial)


def evaluate(opened: Open, text: data.Tokens, decoys: data.Tokens, seed: int) -> Audit:
    rng = np.random.default_rng(seed)
    start = int(rng.integers(len(text) - SEQUENCES * SHAPE.length - 1))
    shard = text[start : start + SEQUENCES * SHAPE.length + 1]
    evaluation = free.Evaluation(opened, SHAPE, NO_BOUND, decoys, 0, rng, lambda: False)
    return evaluation.run({"shard": shard})["shard"]


def trained(kind: dict[str, Any], tokens: data.Tokens) -> dict[str, Tensor]:
    """The weights of a short training in float32."""
    torch.manual_seed(0)
    net = host.import_source("honest", source_of(kind | {"numbers": "fp32", "compiled": ""})).GPT()
    torch.nn.init.normal_(net.embed.weight, 0.0, 0.2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.005)
    batches = data.Batches(tokens, 64, np.random.default_rng(0))
    for _ in range(TRAINING_STEPS):
        windows = torch.from_numpy(batches.take(16, SHAPE.length).astype(np.int64))
        loss = F.cross_entropy(net(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        optimizer.step()
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def perturbed(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: t + NOISE * t.std() * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def evaluations_of(kind: dict[str, Any], wanted: int) -> int:
    return min(3, wanted) if kind["compiled"] else wanted  # each freshly built model is compiled anew


def of_kind(
    kind: dict[str, Any], state: dict[str, Tensor], shards: dict[str, data.Tokens], args: Any
) -> dict[str, Any]:
    """Figures of one kind of model."""
    rules = AuditRules(POSITIONS, TOLERANCE, MEAN_TOLERANCE, 1, 1.0)
    honest, other, real = [], [], []
    for seed in range(evaluations_of(kind, args.evaluations)):
        labels = data.permutation(SHAPE.vocab, (0,), np.random.default_rng(seed))
        # relabelled weights go with relabelled text: only the labels' places in the tables differ
        text, decoys = (data.relabel(shards[name], labels) for name in ("val_hidden", "train"))
        weights = perturbed(state, seed)
        for name in ("embed.weight", "head.weight"):
            if name in weights:
                weights[name] = weights[name][np.argsort(labels)]
        honest.append(evaluate(here(kind, weights), text, decoys, seed))
        if seed < 3 and not kind["compiled"]:
            other.append(evaluate(here(kind, weights, one_by_one=True), text, decoys, seed))
        if seed < args.sandboxed:
            real.append(evaluate(sandboxed(kind, weights), text, decoys, seed))
    largest = [a.max_abs_d for a in honest]
    return {
        **kind,
        "loss": round(float(np.mean([a.audited_loss for a in honest])), 3),
        "evaluations": len(honest),
        "max_abs_d_median": float(np.median(largest)),
        "max_abs_d": max(largest),
        "mean_d_abs_max": max(abs(a.mean_d) for a in honest),
        "refused": sum(not a.passes(rules) for a in honest + real),
        "other_shape_max_abs_d": max((a.max_abs_d for a in other), default=None),
        "other_shape_mean_d_abs_max": max((abs(a.mean_d) for a in other), default=None),
        "sandboxed": len(real),
        "sandboxed_max_abs_d": max((a.max_abs_d for a in real), default=None),
        "equal_to_in_process": all(a == b for a, b in zip(real, honest, strict=False)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=12)
    parser.add_argument("--sandboxed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    process.adopt_orphans()
    paths = data.unpack(content_root() / "gpu_backend" / "corpora" / "shakespeare", cache_dir())
    shards = {name: np.array(data.read_shard(paths[name])) for name in ("train", "val_hidden")}
    states: dict[tuple[str, bool], dict[str, Tensor]] = {}
    rows = json.loads(RESULTS.read_text())["kinds"] if RESULTS.exists() else []
    for kind in kinds():
        if any(
            kind.items() <= row.items() and row["evaluations"] >= evaluations_of(kind, args.evaluations) for row in rows
        ):
            continue
        key = (kind["attention"], kind["tied"])
        if key not in states:
            states[key] = trained(kind, shards["train"])
        rows.append(of_kind(kind, states[key], shards, args))
        print(json.dumps(rows[-1]), flush=True)
        write(rows, f"{COMMAND} --evaluations {args.evaluations} --sandboxed {args.sandboxed}")


def write(rows: list[dict[str, Any]], command: str) -> None:
    total = sum(row["evaluations"] + row["sandboxed"] for row in rows)
    alarms = sum(row["refused"] for row in rows)
    found = {
        "command": command,
        "torch": torch.__version__,
        "positions": POSITIONS,
        "sequences": SEQUENCES,
        "tolerance": TOLERANCE,
        "mean_tolerance": MEAN_TOLERANCE,
        "honest_evaluations": total,
        "false_alarms": alarms,
        "kinds": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{alarms} false alarms in {total} honest evaluations", flush=True)


if __name__ == "__main__":
    main()
