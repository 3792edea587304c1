"""Calibrate a tier without training: the noise is what others have published, start and anchor are public records.

For tiers whose runs cost GPU-hours; `tiers calibrate` measures them where there is the hardware.
"""

from __future__ import annotations

from typing import Any

from nanogpt_env.errors import TierError
from nanogpt_env.measure import Report, boundary_of, loss_test, power_table, silent
from nanogpt_env.tables import HostTiming, StepsCalibration, WallclockCalibration
from nanogpt_env.tracks import StepsTier, Tier, WallclockTier


def calibrate(tier: Tier, report: Report = silent) -> StepsCalibration | WallclockCalibration:
    """Raises `TierError` if the tier has no [published] noise, or is measured on records of its own."""
    table = tier.table
    if table.published is None:
        raise TierError(f"tier {tier.name} has no [published] table to take its noise from")
    if table.human is None:
        raise TierError(f"tier {tier.name} has no [human] table: what its own records count as must be measured")
    noise = table.published
    boundary, error = boundary_of(tier, report)
    found: dict[str, Any] = {
        "fingerprint": tier.fingerprint(),
        "trained": tier.trained(),
        "sigma": noise.sigma,
        "boundary": boundary,
        "boundary_level": tier.level(),
        "power": power_table(loss_test(tier, noise.sigma, boundary), [noise.sigma]),
        "records": {},
        "evidence": {
            "command": f"nanogpt-env tiers calibrate {tier.name} --published",
            "source": noise.source,
            "boundary_error": error,
        },
    }
    if isinstance(tier, StepsTier):
        if table.data.public != table.data.hidden:
            raise TierError(f"tier {tier.name}: how its public and hidden shards differ must be measured")
        return StepsCalibration(**found, shard_offset=0.0, shard_offset_error=0.0, shard_offset_sd=0.0)
    assert isinstance(tier, WallclockTier)
    if noise.pair_sd is None:
        raise TierError(f"tier {tier.name}: published.pair_sd is needed on the wallclock track")
    if not tier.table.audit:
        raise TierError(f"tier {tier.name}: how far a table gets in its fixed model must be measured")
    timing = HostTiming(
        fingerprint=found["fingerprint"], pair_sd=noise.pair_sd, pairs=0, log_ratios={}, log_ratio_errors={},
        evidence={"source": noise.source},
    )  # fmt: skip
    return WallclockCalibration(**found, table_floor={}, timing=timing)
