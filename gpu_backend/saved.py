"""A run's own checkpoint on disk, so that one that was killed goes on where it was. Steps track; one file a rank.

    CACHE/runs/<hash of the job>/<rank>-<step>.safetensors    parameters, the rule's bytes, and what the loop knows

The newest that all ranks have is used; older ones are removed when all have a newer one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ranks import Ranks

if TYPE_CHECKING:
    from trainer import StepsJob

KEEP_S = 14 * 86400.0
"""a run that nobody has gone on with for so long is forgotten"""
_PER_MACHINE = ("cache", "corpus", "cores", "gpu_ids", "limits")


@dataclass
class State:
    """Of a run after so many steps. `rule`: opaque, from the candidate. `loop`: JSON."""

    params: Tensor
    rule: bytes
    loop: dict[str, Any]


class Saved:
    """This rank's part of a run's checkpoints. All ranks must call the same methods in the same order."""

    def __init__(self, job: StepsJob, ranks: Ranks) -> None:
        what = {k: v for k, v in asdict(job).items() if k not in _PER_MACHINE}
        code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        text = json.dumps([what, torch.__version__], sort_keys=True).encode()
        self.folder = Path(job.cache) / "runs" / hashlib.sha256(text + code).hexdigest()[:24]
        self.ranks = ranks

    def load(self) -> State | None:
        """The newest that all ranks have; None if there is none."""
        _forget(self.folder.parent)
        step, found = self.ranks.least(max(self._mine(), default=0)), None
        try:
            found = self._read(step) if step else None
        except Exception as error:  # a damaged file; safetensors has exceptions of its own
            print(f"the run begins anew, as what was saved at step {step} cannot be read: {error}", file=sys.stderr)
        return found if self.ranks.least(int(found is not None)) else None

    def _read(self, step: int) -> State:
        with safe_open(self._path(step), "pt") as file:
            rule = bytes(file.get_tensor("rule").numpy())
            return State(file.get_tensor("params"), rule, json.loads(file.metadata()["loop"]))

    def save(self, step: int, state: State) -> None:
        """Where the disk takes it; a run goes on without."""
        tensors = {"params": state.params.cpu(), "rule": torch.frombuffer(bytearray(state.rule), dtype=torch.uint8)}
        part = self._path(step).with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, {"loop": json.dumps(state.loop)})
            part.replace(self._path(step))
        except Exception as error:  # a full disk; safetensors has exceptions of its own
            print(f"step {step} was not saved: {error}", file=sys.stderr)
            part.unlink(missing_ok=True)
        common = self.ranks.least(max(self._mine(), default=0))
        for old in self._mine():
            if old < common:
                self._path(old).unlink(missing_ok=True)

    def remove(self) -> None:
        """The run has ended. Others than the first rank cannot tell: it may have been killed."""
        if self.ranks.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"{self.ranks.rank}-{step}.safetensors"

    def _mine(self) -> list[int]:
        return [int(p.stem.split("-")[1]) for p in self.folder.glob(f"{self.ranks.rank}-*.safetensors")]


def _forget(folder: Path) -> None:
    for run in folder.glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - max(os.stat(p).st_mtime for p in (run, *run.iterdir())) > KEEP_S:
                shutil.rmtree(run)
