"""Load a tier: a folder with `env.toml`, `task.md`, `records/` and the measured `calibration.json`.

docs/tiers.md explains every field and how to make a tier of your own.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
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
    folders = _lineage(folder)
    content: dict[str, Any] = {}
    for one in reversed(folders):
        content = _extended(content, _toml(one / "env.toml"))
    table = _valid(folder / "env.toml", _AnyTable, content).root
    task = _read(_nearest(folders, "task.md"))
    if isinstance(table, StepsTable):
        return StepsTier(
            folder=folder,
            bases=tuple(folders[1:]),
            table=table,
            records=_load_records(_nearest(folders, "records"), StepsRecord, table.files),
            task=task,
            calibration=load_calibration(_nearest(folders, CALIBRATION), StepsCalibration) if calibrated else None,
        )
    return WallclockTier(
        folder=folder,
        bases=tuple(folders[1:]),
        table=table,
        records=_load_records(_nearest(folders, "records"), HumanRecord, table.files),
        task=task,
        calibration=load_calibration(_nearest(folders, CALIBRATION), WallclockCalibration) if calibrated else None,
        host=load_host_timing(table.name) if host else None,
    )


class _AnyTable(RootModel[Annotated[StepsTable | WallclockTable, Field(discriminator="track")]]):
    pass


def _lineage(folder: Path) -> list[Path]:
    """The folder, the one of the tier that it extends, and so on."""
    folders = [folder]
    while base := _toml(folders[-1] / "env.toml").get("extends"):
        if not isinstance(base, str):
            raise TierError(f"{folders[-1] / 'env.toml'}: extends must name a tier, or a folder relative to this one")
        beside = folders[-1] / base
        found = beside.resolve() if (beside / "env.toml").is_file() else find_tier(base)
        if found in folders:
            raise TierError(f"{folders[-1] / 'env.toml'}: extends {base}, which extends this tier")
        folders.append(found)
    return folders


def _nearest(folders: list[Path], name: str) -> Path:
    """Of the tier itself, or else of what it extends."""
    return next((folder / name for folder in folders if (folder / name).exists()), folders[0] / name)


def _extended(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A tier's settings over those of the tier that it extends."""
    merged = dict(base)
    if "human" in own:  # the one measure of rewards replaces the other
        merged["reward"] = {k: v for k, v in merged.get("reward", {}).items() if k != "anchor"}
    elif "anchor" in own.get("reward", {}):
        merged.pop("human", None)
    for name, value in own.items():
        old = merged.get(name)
        merged[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    merged.pop("extends", None)
    return merged


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TierError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TierError(f"cannot read {path}: {error}") from None


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_read(path))
    except ValueError as error:
        raise TierError(f"{path}: {error}") from None


def _valid(path: Path, model: type[T], content: Any) -> T:
    try:
        return model.model_validate(content)
    except ValueError as error:
        raise TierError(f"{path}: {error}") from None


R = TypeVar("R", bound=HumanRecord)


def _load_records(folder: Path, model: type[R], files: tuple[str, ...]) -> dict[str, R]:
    records = []
    for path in folder.glob("*/record.toml"):
        known = {"name": path.parent.name, "sources": {name: _read(path.parent / name) for name in files}}
        content = _toml(path)
        if twice := set(content) & set(known):
            raise TierError(f"{path}: may not be given here: {', '.join(sorted(twice))}")
        records.append(_valid(path, model, {**content, **known}))
    return {r.name: r for r in sorted(records, key=lambda r: (r.order, r.name))}


C = TypeVar("C", bound=Calibration)


def load_calibration(path: Path, model: type[C]) -> C:
    """Read a `calibration.json`. Raises `TierError` if it is missing or malformed."""
    if not path.exists():
        raise TierError(f"{path.parent} is not calibrated: run `nanogpt-env tiers calibrate {path.parent}`")
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
