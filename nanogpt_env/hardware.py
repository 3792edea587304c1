"""Hardware profiles (`gpu_backend/hardware/*.toml`): peak rates and memory, for MFU, plans and GPU-hours."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from nanogpt_env.content import content_root
from nanogpt_env.errors import TierError
from nanogpt_env.types import Record, RunResult

Positive = Annotated[float, Field(gt=0)]
CPU = "cpu"


class Hardware(Record):
    """One device: a GPU, or a core of a CPU."""

    name: str
    summary: str
    matches: tuple[str, ...]
    """beginnings of the names that such devices have; for the CPU, none"""
    memory_bytes: Positive
    source: str
    peak_flops: Mapping[str, Positive]
    """of dense matrix products, by number format"""

    def seconds(self, flops: float, mfu: float, devices: int = 1) -> float:
        """What so many FLOPs take at a utilisation, in the fastest format there is."""
        return flops / (max(self.peak_flops.values()) * mfu * devices)


def profiles() -> dict[str, Path]:
    return {path.stem: path for path in sorted((content_root() / "gpu_backend" / "hardware").glob("*.toml"))}


def load_hardware(name_or_path: str) -> Hardware:
    """Raises `TierError` naming what there is, or the field at fault."""
    path = profiles().get(name_or_path.lower(), Path(name_or_path))
    try:
        return Hardware(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        known = ", ".join(profiles())
        raise TierError(
            f"hardware {name_or_path!r} is neither a profile ({known}) nor the file of one: {error}"
        ) from None


def of_run(hardware: Mapping[str, Any]) -> Hardware | None:
    """The profile of what a run was trained on, as its result names it; None for a device that has none."""
    device = str(hardware.get("gpu", ""))
    for name in profiles():
        profile = load_hardware(name)
        if device.startswith(profile.matches) if device and profile.matches else not device and name == CPU:
            return profile
    return None


def mfu(result: RunResult) -> float | None:
    """Model FLOPs utilisation: the model's FLOPs over what its devices could have done while it trained. None where the
    FLOPs (free models) or the peak are not known."""
    profile = of_run(result.hardware)
    peak = profile.peak_flops.get(result.hardware.get("numbers", "fp32")) if profile else None
    if not (peak and result.flops and result.train_seconds):
        return None
    return float(result.flops / (result.train_seconds * peak * result.hardware.get("devices", 1)))
