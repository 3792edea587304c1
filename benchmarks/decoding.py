"""What would it be worth to decode batches from their gradients? Upper bounds, with an oracle in the decoder's place.

    python benchmarks/decoding.py [--seeds 3]

On nano-steps, with the anchor's rule. The oracle knows every batch that has passed, for nothing. It uses them for
`passes` further passes a step over earlier batches and some more at the end, or for a table: after `table` steps
embedding and head become the best bigram table of the batches so far, stopped by the public validation loss, and
training goes on from there, with the rule's learning rates times `rates`. Losses are on the hidden shard; honest rules
of fewer steps give the scale. What decoding costs, in time and in batches that are spent on it, is not in these
figures. Goes on where it stopped; writes benchmarks/results/decoding.json.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import in_process  # makes the trainer importable
import numpy as np
import torch

from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import StepsTier
from nanogpt_env.types import Plan

import table_floor
from trainer import Result, StepsJob
from training import Training

RESULTS = Path(__file__).parent / "results" / "decoding.json"
HONEST = ({"steps": 100}, {"steps": 115}, {"steps": 130}, {"steps": 142})
ORACLES = (
    {"steps": 105, "passes": 0.8, "final": 20},
    {"steps": 115, "passes": 0.35, "final": 7},
    {"steps": 115, "table": 15},
    {"steps": 115, "table": 30},
    {"steps": 115, "table": 60},
    {"steps": 115, "table": 90},
    {"steps": 142, "table": 142},
    {"steps": 115, "table": 30, "rates": 0.3},
    {"steps": 115, "table": 60, "rates": 0.3},
    {"steps": 115, "table": 30, "rates": 0.1},
    {"steps": 115, "table": 60, "rates": 0.1},
)
RATES = re.compile(r"^MUON_LR, ADAM_LR = ([\d.]+), ([\d.]+)$", re.MULTILINE)


def run(tier: StepsTier, record: str, seed: int, steps: int, rates: float = 1.0, **oracle: float) -> float:
    """Hidden loss of one run."""
    source, public, hidden = tier.record(record).sources["optimizer.py"], tier.table.data.public, tier.table.data.hidden
    source, changed = RATES.subn(lambda m: f"MUON_LR, ADAM_LR = {rates * float(m[1])}, {rates * float(m[2])}", source)
    assert changed == 1
    job = tier.job({"optimizer.py": source}, Plan(steps=steps, horizon=steps), f"decoding/{seed}", (hidden, public))
    training = Training(StepsJob(**json.loads(job.model_dump_json())), Result(), lambda: False)
    model, length = training.model, training.config.seq_len
    batches = [training.batches.take(job.batch_size, length) for _ in range(steps)]
    order = lesson(batches, np.random.default_rng(seed), **oracle)
    rule = in_process.InProcessRule(training, source, max(1, len(order)), seed)
    if table := int(oracle.get("table", 0)):
        write_table(training, batches[:table], training.val[public])
    for step, window in enumerate(order):
        ids = torch.from_numpy(window.astype(np.int64))
        training.flat.gradients.zero_()
        model(ids[:, :-1], ids[:, 1:]).backward()
        rule.step(step, 0.0)
    return training.evaluate(training.val[hidden])


def lesson(
    batches: list[np.ndarray], rng: np.random.Generator, passes: float = 0.0, final: float = 0, table: float = 0
) -> list[np.ndarray]:
    """The batches that are trained on, in order: those after the table, further passes among them."""
    order, owed = [], 0.0
    for step, window in enumerate(batches[int(table) :], 1):
        order.append(window)
        owed += passes
        while owed >= 1:
            owed -= 1
            order.append(batches[int(rng.integers(step))])
    return order + [batches[int(rng.integers(len(batches)))] for _ in range(int(final))]


def write_table(training: Training, seen: list[np.ndarray], public: np.ndarray) -> None:
    """Embedding and head to the best table; the blocks, whose outputs begin at zero, as the rule has set them."""
    model, size = training.model, training.config.vocab_size
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("blocks.")}
    counts = sum((table_floor.bigrams(window, size) for window in seen), start=torch.zeros(()))
    table_floor.fit(model, counts, table_floor.bigrams(public[None], size))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in kept:
                p.copy_(kept[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tier = load_tier("nano-steps")
    assert isinstance(tier, StepsTier)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    done = [{k: v for k, v in row.items() if k not in ("loss", "losses")} for row in rows]
    for setting in (s for s in (*HONEST, *ORACLES) if s not in done):
        losses = [run(tier, tier.table.valued[-1], seed, **setting) for seed in range(args.seeds)]
        rows.append({**setting, "loss": float(np.mean(losses)), "losses": losses})
        print({**rows[-1], "losses": [round(x, 4) for x in losses]}, flush=True)
        content = {"command": f"python benchmarks/decoding.py --seeds {args.seeds}", "rows": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
