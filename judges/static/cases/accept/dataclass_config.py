"""AdamW whose settings live in one frozen dataclass."""

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch


class Phase(Enum):
    WARMUP = "warmup"
    STABLE = "stable"
    DECAY = "decay"


class Betas(NamedTuple):
    first: float = 0.9
    second: float = 0.95


@dataclass(frozen=True)
class Config:
    lr: float = 8e-3
    betas: Betas = field(default_factory=Betas)
    decay_share: float = 0.4
    warmup_steps: int = 20

    def phase(self, step: int, horizon: int) -> Phase:
        if step < self.warmup_steps:
            return Phase.WARMUP
        return Phase.DECAY if step > (1 - self.decay_share) * horizon else Phase.STABLE


CONFIG = dataclasses.replace(Config(), lr=9e-3)


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=CONFIG.lr, betas=tuple(CONFIG.betas))


def schedule(step, horizon, optimizers):
    match CONFIG.phase(step, horizon):
        case Phase.WARMUP:
            factor = (step + 1) / CONFIG.warmup_steps
        case Phase.DECAY:
            factor = (horizon - step) / (CONFIG.decay_share * horizon)
        case _:
            factor = 1.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.lr * factor
