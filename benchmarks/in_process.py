"""A candidate applied in the trainer's own process, as a script of a researcher would: no sandbox, no hand-off."""

from __future__ import annotations

import sys
from typing import Any

from nanogpt_env.content import content_root

sys.path.insert(0, str(content_root() / "gpu_backend"))

import torch

from training import Training


class InProcessRule:
    has_readout = False

    def __init__(self, training: Training, source: str, horizon: int, seed: int) -> None:
        self.flat, self.horizon = training.flat, horizon
        torch.manual_seed(seed)
        self.module: dict[str, Any] = {}
        exec(compile(source, "optimizer.py", "exec"), self.module)
        params = dict(training.model.named_parameters())
        if "init" in self.module:
            with torch.no_grad():
                self.module["init"](params)
        made = self.module["configure"](params, horizon)
        self.optimizers = made if isinstance(made, list) else [made]

    def step(self, step: int, forward_backward_s: float) -> None:
        if "schedule" in self.module:
            self.module["schedule"](step, self.horizon, self.optimizers)
        for optimizer in self.optimizers:
            optimizer.step()

    def readout(self) -> torch.Tensor:
        return self.flat.params
