"""Where the shipped folders are (envs/, judges/, gpu_backend/) and where we may write."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import platformdirs

_PACKAGE = Path(__file__).resolve().parent


@functools.cache
def content_root() -> Path:
    """The folder that holds envs/, judges/ and gpu_backend/: in the wheel, or the checkout."""
    installed = _PACKAGE / "_content"
    return installed if installed.is_dir() else _PACKAGE.parent


def attack_content(name: str) -> Path:
    """A folder of tests/ that `nanogpt-env attack` needs; the wheel has it beside envs/."""
    root = content_root()
    return root / name if (root / name).is_dir() else root / "tests" / name


def cache_dir() -> Path:
    """For what can be made again (unpacked shards). NANOGPT_ENV_CACHE overrides."""
    return Path(os.environ.get("NANOGPT_ENV_CACHE") or platformdirs.user_cache_path("nanogpt_env"))


def state_dir() -> Path:
    """For ledgers and evidence. NANOGPT_ENV_STATE overrides."""
    return Path(os.environ.get("NANOGPT_ENV_STATE") or platformdirs.user_state_path("nanogpt_env"))


@functools.cache
def trainer_code() -> bytes:
    """All of the trainer: what its results depend on beside the job."""
    return b"".join(path.read_bytes() for path in sorted((content_root() / "gpu_backend").glob("*.py")))
