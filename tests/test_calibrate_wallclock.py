"""Calibration of a wallclock tier on synthetic runs whose losses and times are known."""

import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeBackend
from helpers import edit
from test_wallclock import timed

from nanogpt_env import calibrate_wallclock as c
from nanogpt_env import measure, stats
from nanogpt_env.errors import BackendError, TierError
from nanogpt_env.tiers import CALIBRATION, load_tier, write_calibration

TINY = Path(__file__).parent / "tiny-wallclock"
TARGET = load_tier(TINY).table.training.target
FLOOR = {"bigrams": TARGET + 0.3, "finished": TARGET + 0.2}
LOSS_SD, TIME_SD = 0.02, 0.03


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "BOUNDARY_PATHS", 200_000)
    for module in (c, measure):
        monkeypatch.setattr(module, "predicted_power", functools.partial(stats.predicted_power, paths=20_000))
    monkeypatch.setattr(c, "table_floor", lambda tier, report=None: FLOOR)
    monkeypatch.setenv("NANOGPT_ENV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOGPT_ENV_STATE", str(tmp_path / "state"))


def tier():
    return load_tier(TINY, calibrated=False)


def synthetic(margins=(0.08, 0.06), seconds=(4.0, 2.0), used=(102400, 40000), fails=lambda number: False):
    """Runs of slow and fast: loss so far below the target, training time, tokens."""
    names = ("slow", "fast")
    by_source = {tier().records[n].sources["train.py"]: i for i, n in enumerate(names)}

    def script(job, number):
        i, rng = by_source[job.sources["train.py"]], np.random.default_rng([5, number])
        if fails(number):
            return timed(job, 0.0, 1.0, exit_reason="candidate_error", detail="broken", val_losses={}, log="its words")
        loss = TARGET - margins[i] + rng.normal(0, LOSS_SD)
        return timed(job, loss, seconds[i] * math.exp(rng.normal(0, TIME_SD / math.sqrt(2))), tokens=used[i])

    return FakeBackend(script)


def calibrated(backend, **options):
    return c.calibrate(tier(), backend, **({"reruns": 12, "seeds": 5, "sessions": 3} | options))


def test_a_calibration_says_what_was_put_in():
    backend = synthetic()
    made = calibrated(backend)
    for name, margin in (("slow", 0.08), ("fast", 0.06)):
        row = made.records[name]
        assert row.loss_mean == pytest.approx(TARGET - margin, abs=4 * LOSS_SD / math.sqrt(12))
        assert row.power > 0.9
        assert row.loss_n == 12
    assert made.sigma == pytest.approx(LOSS_SD, rel=0.6)
    timing = made.timing
    assert timing.log_ratios["fast"] == pytest.approx(math.log(0.5), abs=4 * TIME_SD / 3)
    assert timing.pair_sd == pytest.approx(TIME_SD, rel=0.9)
    assert timing.pairs == 3 * 3
    assert made.records["slow"].value == 1.0
    assert made.records["fast"].value_n == 9
    assert made.table_floor == FLOOR
    assert backend.sessions == 3
    assert len(backend.jobs) == 12 + 12 + 3 * (1 + 2 * 3)


def test_what_was_calibrated_loads(tmp_path):
    folder = tmp_path / "tier"
    shutil.copytree(TINY, folder)
    write_calibration(folder / CALIBRATION, calibrated(synthetic()))
    loaded = load_tier(folder)
    assert loaded.value_of("fast") == pytest.approx(loaded.measured.records["fast"].value, abs=1e-3)
    assert loaded.value_of("fast") > 0.5  # what is shown, not what was measured


def test_finished_runs_and_sessions_are_kept():
    stop = 12 + 12 + 7 + 3  # in the second session
    first = synthetic(fails=lambda number: number == stop)
    with pytest.raises(TierError, match="candidate_error"):
        calibrated(first)
    again = synthetic()
    calibrated(again)
    assert len(again.jobs) == 2 * 7  # the second session anew, and the third
    retimed = synthetic(seconds=(4.0, 3.0))
    made = calibrated(retimed, retime=True)
    assert len(retimed.jobs) == 3 * 7
    assert made.timing.log_ratios["fast"] == pytest.approx(math.log(0.75), abs=4 * TIME_SD / 3)


def test_a_target_that_a_table_comes_close_to_is_refused(monkeypatch):
    monkeypatch.setattr(c, "table_floor", lambda tier, report=None: {"bigrams": 6.0, "finished": TARGET + 0.05})
    backend = synthetic()
    with pytest.raises(TierError, match=r"table.*must be below 4\.850"):
        calibrated(backend)
    assert backend.jobs == []


@pytest.mark.parametrize("margins", [(0.01, 0.06), (0.08, -0.1)])
def test_a_record_that_misses_the_target_is_named(margins):
    name = "slow" if margins[0] < 0.02 else "fast"
    with pytest.raises(TierError, match=f"record {name} has a mean loss"):
        calibrated(synthetic(margins=margins))


def test_the_token_cap_is_what_the_start_record_uses():
    with pytest.raises(TierError, match=r"uses 90,000 tokens; set training\.tokens"):
        calibrated(synthetic(used=(90_000, 40_000)))


def test_a_failing_record_is_shown():
    with pytest.raises(TierError, match="its words"):
        calibrated(synthetic(fails=lambda number: number == 3))


def test_a_host_is_timed_by_start_and_anchor():
    known = load_tier(TINY)
    backend = synthetic(seconds=(4.0, 3.0))
    timing = c.time_host(known, backend, 4)
    assert timing.log_ratios["fast"] == pytest.approx(math.log(0.75), abs=4 * TIME_SD / math.sqrt(12))
    assert timing.fingerprint == known.fingerprint()
    assert timing.pairs == 12
    assert len(backend.jobs) == 4 * 7
    assert c.time_host(known, backend, 2).pairs == 6  # measured anew, not remembered
    assert len(backend.jobs) == 6 * 7


def test_a_table_is_fitted_for_real(monkeypatch):
    """On the tiny tier: far below the target, which is why it may not become a benchmark."""
    monkeypatch.undo()
    found = c.table_floor(tier())
    assert 4.0 < found["finished"] <= found["bigrams"] + 0.1 < 4.9
    with pytest.raises(TierError, match="table of bigrams"):
        c.check_table_floor(tier(), found)


def test_a_table_that_cannot_be_fitted_is_a_failure_of_ours(monkeypatch, tmp_path):
    monkeypatch.undo()
    folder = tmp_path / "tier"
    shutil.copytree(TINY, folder)
    edit(folder / "env.toml", "[data]\n", '[data]\nhidden = "nowhere"\n')
    with pytest.raises(BackendError, match="nowhere"):
        c.table_floor(load_tier(folder, calibrated=False))


def test_the_calibration_is_json(tmp_path):
    made = calibrated(synthetic())
    text = json.dumps(made.model_dump())
    assert "NaN" not in text
    assert json.loads(text)["timing"]["evidence"]["sessions"]["fast"][0].keys() == {"seconds", "start_seconds"}
