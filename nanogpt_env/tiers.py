"""Load a tier: a folder with `env.toml`, `task.md`, `records/` and the measured `calibration.json`.

docs/tiers.md explains every field and how to make a tier of your own.
"""

from __future__ import annotations

import json
import tomllib
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, RootModel

from nanogpt_env.content import content_root, state_dir
from nanogpt_env.errors import ActionError, TierError
from nanogpt_env.tables import (
    Calibration,
    HostTiming,
    HumanRecord,
    StepsCalibration,
    StepsRecord,
    StepsTable,
    WallclockCalibration,
    WallclockTable,
)
from nanogpt_env.tracks import StepsTier, Tier, WallclockTier

ENTRY_POINTS = "nanogpt_env.tiers"
CALIBRATION = "calibration.json"
T = TypeVar("T", bound=BaseModel)


def builtin_tiers() -> list[str]:
    return sorted(p.parent.name for p in (content_root() / "envs").glob("*/env.toml"))


def tier_folders() -> dict[str, Path]:
    """Every tier that has a name here: built-in ones and those of installed packages."""
    folders = {name: content_root() / "envs" / name for name in builtin_tiers()}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            spec = util.find_spec(entry.value)
        except Exception:  # somebody else's broken package is no reason to fail
            continue
        if spec is not None and spec.origin:
            folders.setdefault(entry.name, Path(spec.origin).parent)
    return folders


def find_tier(name_or_path: str | Path) -> Path:
    """The folder of a tier, given by name or path. Raises `TierError` naming what there is."""
    folders = tier_folders()
    if str(name_or_path) in folders:
        return folders[str(name_or_path)]
    path = Path(name_or_path)
    if (path / "env.toml").is_file():
        return path.resolve()
    raise TierError(
        f"no tier {str(name_or_path)!r}: it is neither a folder with an env.toml nor one of {', '.join(folders)}"
    )


def load_tier(name_or_path: str | Path, *, calibrated: bool = True, host: bool = True) -> Tier:
    """Read and check a tier. With `calibrated`, its calibration must be there and fit its contents. With `host`, times
    that were measured on this host replace the calibration's.

    Raises `TierError` with the file and field at fault.
    """
    folder = find_tier(name_or_path)
    try:
        tier = _load(folder, calibrated, host)
        for record in tier.table.valued:
            tier.record(record)
        if calibrated:
            _check_calibration(tier)
    except (ValueError, OSError) as error:
        raise TierError(f"tier in {folder}: {error}") from None
    return tier


def _load(folder: Path, calibrated: bool, host: bool) -> Tier:
    path, task = folder / "env.toml", _read(folder / "task.md")
    table = _read_toml(path, _AnyTable).root
    if isinstance(table, StepsTable):
        return StepsTier(
            folder=folder,
            table=table,
            records=_load_records(folder, StepsRecord, table.files),
            task=task,
            calibration=load_calibration(folder, StepsCalibration) if calibrated else None,
        )
    return WallclockTier(
        folder=folder,
        table=table,
        records=_load_records(folder, HumanRecord, table.files),
        task=task,
        calibration=load_calibration(folder, WallclockCalibration) if calibrated else None,
        host=load_host_timing(table.name) if host else None,
    )


class _AnyTable(RootModel[Annotated[StepsTable | WallclockTable, Field(discriminator="track")]]):
    pass


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TierError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TierError(f"cannot read {path}: {error}") from None


def _read_toml(path: Path, model: type[T], **known: Any) -> T:
    try:
        content = tomllib.loads(_read(path))
        if twice := set(content) & set(known):
            raise ValueError(f"may not be given here: {', '.join(sorted(twice))}")
        return model.model_validate({**content, **known})
    except ValueError as error:
        raise TierError(f"{path}: {error}") from None


R = TypeVar("R", bound=HumanRecord)


def _load_records(folder: Path, model: type[R], files: tuple[str, ...]) -> dict[str, R]:
    records = []
    for path in (folder / "records").glob("*/record.toml"):
        sources = {name: _read(path.parent / name) for name in files}
        records.append(_read_toml(path, model, name=path.parent.name, sources=sources))
    return {r.name: r for r in sorted(records, key=lambda r: (r.order, r.name))}


C = TypeVar("C", bound=Calibration)


def load_calibration(folder: Path, model: type[C]) -> C:
    """Read `calibration.json`. Raises `TierError` if it is missing or malformed."""
    path = folder / CALIBRATION
    if not path.exists():
        raise TierError(f"{folder} is not calibrated: run `nanogpt-env tiers calibrate {folder}`")
    try:
        return model.model_validate(json.loads(_read(path)))
    except (ValueError, RecursionError) as error:
        raise TierError(f"{path}: {error}") from None


def host_timing_path(tier: str) -> Path:
    return state_dir() / "timing" / f"{tier}.json"


def load_host_timing(tier: str) -> HostTiming | None:
    """What `tiers time` measured on this host, if it did. Raises `TierError` if the file is malformed."""
    path = host_timing_path(tier)
    if not path.exists():
        return None
    try:
        return HostTiming.model_validate_json(_read(path))
    except (ValueError, RecursionError) as error:
        raise TierError(f"{path}: {error}; delete it, or run `nanogpt-env tiers time {tier}`") from None


def _check_calibration(tier: Tier) -> None:
    c = tier.measured
    way_out = f"run `nanogpt-env tiers calibrate {tier.folder}`"
    if c.fingerprint != tier.fingerprint():
        raise TierError(f"tier {tier.name} was changed after its calibration: {way_out}")
    if abs(c.boundary_level / tier.level() - 1) > 1e-9:
        raise TierError(
            f"tier {tier.name}: the boundary was computed for level {c.boundary_level:g} but alpha / submissions "
            f"is {tier.level():g}: {way_out} --recompute"
        )
    tier.trial_fields()
    check_values(tier)


def check_values(tier: Tier) -> None:
    """Raises `TierError` unless the start record is slower than the anchor."""
    try:
        tier.span()
    except ActionError as error:
        raise TierError(f"tier {tier.name}: {error}") from None


def write_calibration(path: Path, calibration: Calibration | HostTiming) -> None:
    """In one piece: what is there before or after a crash is whole."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(calibration.model_dump(), indent=1) + "\n")
    temporary.replace(path)
