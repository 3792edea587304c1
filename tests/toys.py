"""GPU tiers in small: their programs and settings on the CPU, with another model and corpus, calibrated as they are."""

from pathlib import Path

from nanogpt_env import measure, published
from nanogpt_env.tiers import CALIBRATION, load_tier, write_calibration

COMMON = """
[model]
layers = 2
width = 64
heads = 2
vocab_size = 1024
seq_len = {seq_len}

[data]
corpus = "shakespeare"
train = "train"
public = "val_hidden"
hidden = "val_hidden"
"""
STEPS = """
[training]
batch_size = 8
target = {target}
max_horizon = 200
point_tokens = 4097
micro_batch = 4
numbers = "{numbers}"
compile = {compile}
save_every = {save_every}

[limits]
memory_mib = 1024
"""
WALLCLOCK = """
[training]
target = {target}
tokens = {tokens}
max_batch_tokens = 2048

[audit]
positions = 64
checkpoint_bytes = 4194304

[limits]
memory_mib = 1024
cache_mib = 16
"""


def toy(folder, base, monkeypatch, **changes):
    """The tier in small, loaded from `folder`, which is made."""
    steps = str(base).endswith("steps")
    values = {
        "target": 5.5,
        "seq_len": 128,
        "tokens": 2048 * 40,
        "numbers": "bf16",
        "compile": "false",
        "save_every": 0,
    } | changes
    folder.mkdir()
    head = f'extends = "{base}"\nname = "toy-{Path(base).name}"\ngpus = 0\n'
    (folder / "env.toml").write_text((head + COMMON + (STEPS if steps else WALLCLOCK)).format(**values))
    monkeypatch.setattr(measure, "BOUNDARY_PATHS", 200_000)
    write_calibration(folder / CALIBRATION, published.calibrate(load_tier(folder, calibrated=False)))
    return load_tier(folder)
