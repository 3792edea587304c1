"""Calibrations by hand of the wallclock fixtures: `python tests/wallclock_fixtures.py` writes them anew.

They are no benchmarks: their runs are too short to be timed well, and a table beats their targets.
"""

import math
from pathlib import Path

from nanogpt_env.stats import boundary_constant
from nanogpt_env.tables import HostTiming, TimedRecordCalibration, WallclockCalibration
from nanogpt_env.tiers import CALIBRATION, load_tier, write_calibration

HERE = Path(__file__).parent
BY_HAND = {"note": "made by hand, for tests: tests/wallclock_fixtures.py"}
# record -> (loss, tokens, seconds), measured once
MEASURED = {
    "tiny-wallclock": {"slow": (4.39, 102400, 2.4), "fast": (4.74, 30720, 0.72)},
    "tiny-free": {"window-slow": (5.10, 102400, 3.4), "window": (5.77, 102400, 2.7), "window-short": (5.6, 38400, 1.3)},
}
SIGMA, PAIR_SD = 0.03, 0.1


def calibration(folder):
    tier = load_tier(folder, calibrated=False)
    constant, error = boundary_constant(tier.level(), 3, 8, paths=4_000_000)
    rows = MEASURED[tier.name]
    start = rows[tier.table.reward.start][2]
    ratios = {name: math.log(seconds / start) for name, (_, _, seconds) in rows.items() if seconds != start}
    return WallclockCalibration(
        fingerprint=tier.fingerprint(),
        trained=tier.trained(),
        sigma=SIGMA,
        boundary=math.ceil((constant + 2 * error) * 1e3) / 1e3,
        boundary_level=tier.level(),
        power={},
        evidence=BY_HAND,
        records={
            name: TimedRecordCalibration(loss_sd=SIGMA, loss_mean=loss, loss_n=4, power=1.0, tokens=tokens)
            for name, (loss, tokens, _) in rows.items()
        },
        table_floor={"bigrams": 4.4, "finished": 4.4},
        timing=HostTiming(
            fingerprint=tier.fingerprint(),
            pair_sd=PAIR_SD,
            pairs=3,
            log_ratios=ratios,
            log_ratio_errors=dict.fromkeys(ratios, 0.05),
            evidence=BY_HAND,
        ),
    )


if __name__ == "__main__":
    for name in MEASURED:
        write_calibration(HERE / name / CALIBRATION, calibration(HERE / name))
