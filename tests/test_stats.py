"""Known answers of the sequential test, and what it must hold to in simulation."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import special
from scipy import stats as scipy_stats

from nanogpt_env.stats import (
    SequentialTest,
    Simulation,
    boundary_constant,
    critical_margins,
    decide_paths,
    margin_for_power,
    predicted_power,
    runs_to_tell,
    simulate,
    upper_sd,
    z_rule,
)

SIGMA = 0.0013
PATHS = 100_000
# The design tuned on human reruns, with the constant rounded up from 2.6056.
REC = SequentialTest.for_tier(3.28, SIGMA, level=0.01, n_min=3, n_max=14, boundary=2.615)
# Constants from boundary_constant(level, 5, 14, paths=40_000_000), rounded up by two errors.
CPU = SequentialTest.for_tier(3.28, SIGMA, level=0.01, n_min=5, n_max=14, boundary=2.603)
CPU_K8 = SequentialTest.for_tier(3.28, SIGMA, level=0.00125, n_min=5, n_max=14, boundary=3.244)


def false_accepts_within(level: float, accepts: int, paths: int) -> bool:
    """Whether `accepts` false accepts among `paths` are at most the nominal level.

    Tolerance: three binomial standard errors of the count at exactly that level.
    """
    return accepts <= level * paths + 3 * math.sqrt(paths * level * (1 - level))


def naive_accepts(level: float, paths: int, seed: int) -> int:
    """False accepts of a one-sided t test at `level` repeated after each of 2..14 runs."""
    z = np.random.default_rng(seed).standard_normal((paths, 14))
    accepted = np.zeros(paths, dtype=bool)
    for n in range(2, 15):
        t = -z[:, :n].mean(axis=1) * math.sqrt(n) / z[:, :n].std(axis=1, ddof=1)
        accepted |= t >= -special.stdtrit(n - 1, level)
    return int(accepted.sum())


# --- design constants ----------------------------------------------------------------------------


def test_rec_constants_scale_with_sigma() -> None:
    assert REC.sd_floor == pytest.approx(0.0011)
    assert REC.futility_delta == pytest.approx(0.0018)
    assert REC.futility_sd == SIGMA
    assert (REC.futility_beta, REC.shape) == (0.07, 0.25)
    wide = SequentialTest.for_tier(5.0, 10 * SIGMA, 0.01, 3, 14, 2.615)
    assert wide.sd_floor == pytest.approx(0.011)
    assert wide.futility_loss(1) - 5.0 == pytest.approx(10 * (REC.futility_loss(1) - 3.28))


def test_rec_thresholds() -> None:
    published_c = [90.79, 18.44, 9.39, 6.57, 5.28, 4.55, 4.09, 3.77, 3.53, 3.34, 3.19, 3.07]
    published_p = [6.1e-5, 0.00017, 0.00036, 0.00061, 0.00094, 0.0013]
    published_p += [0.0017, 0.0022, 0.0027, 0.0033, 0.0039, 0.0045]
    for n, c, p in zip(range(3, 15), published_c, published_p, strict=True):
        assert REC.threshold(n) == pytest.approx(c, abs=0.0051)
        assert special.stdtr(n - 1, -REC.threshold(n)) == pytest.approx(p, rel=0.04)
    assert REC.threshold(2) == math.inf
    with pytest.raises(ValueError, match=r"1\.\.14"):
        REC.threshold(15)


def test_thresholds_are_accurate_in_tiny_tails() -> None:
    for n in range(5, 15):
        tail = scipy_stats.norm.sf(3.6 * (14 / n) ** 0.25)
        test = replace(CPU_K8, boundary=3.6)
        assert test.threshold(n) == pytest.approx(scipy_stats.t.isf(tail, n - 1), rel=1e-9)


def test_rec_futility_line() -> None:
    for n, loss in [(1, 3.28160), (2, 3.28035), (4, 3.27972), (10, 3.27935)]:
        assert REC.futility_loss(n) == pytest.approx(loss, abs=5.1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("target", math.nan, "target"),
        ("level", 0.0, "level"),
        ("level", 0.001, "too small for level"),
        ("n_min", 1, "n_min"),
        ("n_max", 2, "n_max"),
        ("boundary", math.inf, "boundary"),
        ("sd_floor", 0.0, "sd_floor"),
        ("futility_delta", -1.0, "futility_delta"),
        ("futility_sd", 0.0, "futility_sd"),
        ("futility_beta", 1.0, "futility_beta"),
        ("shape", 0.6, "shape"),
    ],
)
def test_bad_designs_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(REC, **{field: value})


def test_boundary_constant_reproduces_rec() -> None:
    constant, error = boundary_constant(0.01, 3, 14, paths=4_000_000)
    assert error == pytest.approx(0.0017, rel=0.3)
    # The published 2.6056 is itself a Monte Carlo of 4 million paths.
    assert abs(constant - 2.6056) < 3 * math.sqrt(2) * error


def test_boundary_constant_of_a_single_look_is_the_normal_quantile() -> None:
    constant, error = boundary_constant(0.01, 14, 14, paths=400_000)
    assert constant == pytest.approx(-special.ndtri(0.01), abs=4 * error + 1e-9)
    with pytest.raises(ValueError, match="paths"):
        boundary_constant(0.001, 5, 14, paths=1000)


# --- decisions -----------------------------------------------------------------------------------


def test_accepts_at_the_first_look_that_can() -> None:
    losses = [3.270, 3.2701, 3.2699, 3.2700, 3.2700]
    decision = REC.decide(losses)
    assert decision.outcome == "accept"
    # sd is below the floor, so t = .01 * sqrt(n) / .0011 = 9.09 * sqrt(n): 18.18 misses 18.44.
    assert decision.n == 5
    assert decision.statistic == pytest.approx(0.01 * math.sqrt(5) / 0.0011, rel=1e-3)
    assert decision.threshold == REC.threshold(5)


def test_losses_after_a_decision_do_not_matter() -> None:
    losses = [3.27] * 5
    first = CPU.decide(losses)
    assert first.outcome == "accept"
    for extra in ([9.0] * 3, [math.nan], [math.inf] * 20, [0.0]):
        assert CPU.decide(losses + extra) == first
    bad = CPU.decide([3.30])
    assert bad.outcome == "reject"
    assert CPU.decide([3.30] + [3.20] * 13) == bad
    late = CPU.decide([3.27915] * 14)
    assert (late.outcome, late.n) == ("reject", 14)
    assert CPU.decide([3.27915] * 14 + [3.2] * 100) == late


def test_equal_losses_are_judged_by_the_floor() -> None:
    decision = CPU.decide([3.279] * 5)
    assert decision.outcome == "continue"
    assert decision.statistic == pytest.approx(0.001 * math.sqrt(5) / 0.0011)
    assert CPU.decide([3.275] * 5).outcome == "accept"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_crashed_or_non_finite_rerun_rejects(bad: float) -> None:
    for before in (0, 3, 4):
        decision = CPU.decide([3.20] * before + [bad] + [3.20] * 9)
        assert (decision.outcome, decision.n) == ("reject", before + 1)
        assert decision.statistic == -math.inf


def test_decision_before_any_rerun_is_to_continue() -> None:
    assert CPU.decide([]).outcome == "continue"
    assert CPU.decide([3.2]).outcome == "continue"
    with pytest.raises(ValueError, match="at least one"):
        CPU.statistic([])


@pytest.mark.parametrize("test", [REC, CPU, CPU_K8])
def test_vectorised_decisions_agree_with_decide(test: SequentialTest) -> None:
    rng = np.random.default_rng(3)
    margins = rng.uniform(-0.001, 0.004, 500)
    losses = 3.28 - margins[:, None] + rng.normal(0, 0.0015, (500, 14))
    losses[rng.random(losses.shape) < 0.01] = math.inf
    accepted, n = decide_paths(test, losses)
    decisions = [test.decide(list(row)) for row in losses]
    assert [d.outcome == "accept" for d in decisions] == accepted.tolist()
    assert [d.n for d in decisions] == n.tolist()
    assert 100 < accepted.sum() < 400
    with pytest.raises(ValueError, match="shape"):
        decide_paths(test, losses[:, :7])


# --- operating characteristics -------------------------------------------------------------------


@pytest.mark.parametrize("sd_ratio", [1 / 3, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("test", [REC, CPU, CPU_K8])
def test_false_accepts_at_the_boundary_are_at_most_nominal(test: SequentialTest, sd_ratio: float) -> None:
    result = simulate(test, 0.0, sd_ratio * SIGMA, PATHS, seed=11)
    assert false_accepts_within(test.level, round(result.accept_rate * PATHS), PATHS)


@pytest.mark.parametrize("test", [REC, CPU, CPU_K8])
def test_boundary_alone_spends_the_level(test: SequentialTest) -> None:
    # Without floor and futility the constant is neither too small nor wasteful.
    bare = replace(test, sd_floor=1e-12, futility_delta=1e-12)
    rate = simulate(bare, 0.0, SIGMA, 4 * PATHS, seed=12).accept_rate
    assert rate == pytest.approx(test.level, abs=4 * math.sqrt(test.level / (4 * PATHS)) + 3e-4)
    assert false_accepts_within(test.level, round(rate * 4 * PATHS), 4 * PATHS)


@pytest.mark.parametrize("level", [0.01, 0.00125])
def test_a_naive_repeated_test_fails_the_same_check(level: float) -> None:
    assert not false_accepts_within(level, naive_accepts(level, PATHS, seed=13), PATHS)


@pytest.mark.parametrize(
    ("margin", "rate", "tolerance", "mean_n"),
    [
        # The published loop ran few paths: its own error is about .006 at .850.
        (0.0, 0.0028, 0.0007, None),
        (0.0015, 0.850, 0.012, 10.0),
        (0.002, 0.980, 0.004, 8.8),
        (0.01, 1.0, 0.0, 4.8),
        (-0.01, 0.0, 0.0, 1.0),
    ],
)
def test_rec_power_and_rerun_counts(margin: float, rate: float, tolerance: float, mean_n: float | None) -> None:
    result = simulate(REC, margin, SIGMA, PATHS, seed=14)
    assert result.accept_rate == pytest.approx(rate, abs=tolerance)
    if mean_n is not None:
        assert result.mean_n == pytest.approx(mean_n, abs=0.1)
    assert result.accept_se == pytest.approx(math.sqrt(result.accept_rate * (1 - result.accept_rate) / PATHS))
    assert 1 <= result.n_quantiles[0] <= result.n_quantiles[1] <= result.n_quantiles[2] <= 14


def test_rec_false_accepts_by_sd() -> None:
    for sd, rate in [(0.001, 0.0003), (0.0013, 0.0025), (0.002, 0.0072), (0.004, 0.0087)]:
        measured = simulate(REC, 0.0, sd, 4 * PATHS, seed=15).accept_rate
        assert measured == pytest.approx(rate, abs=4 * math.sqrt(rate / (4 * PATHS)) + 1e-4)


def test_simulation_of_only_rejections() -> None:
    result = Simulation.of(np.zeros(4, dtype=bool), np.array([1, 1, 2, 4]))
    assert (result.accept_rate, result.mean_n, result.n_quantiles) == (0.0, 2.0, (1, 1, 4))
    assert math.isnan(result.mean_n_accepted)


def test_simulate_checks_its_arguments() -> None:
    bad: list[dict[str, Any]] = [{"sd": 0.0}, {"sd": 1.0, "paths": 0}]
    bad.append({"sd": 1.0, "margin_sd": -1.0})
    for arguments in bad:
        with pytest.raises(ValueError, match="must"):
            simulate(REC, 0.0, **arguments)


# --- planning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sd_ratio", [0.5, 1.0, 2.0])
def test_margin_for_power(sd_ratio: float) -> None:
    sd = sd_ratio * SIGMA
    margin = margin_for_power(CPU, sd)
    assert simulate(CPU, margin, sd, PATHS, seed=21).accept_rate == pytest.approx(0.9, abs=0.005)
    assert margin_for_power(CPU, sd, power=0.99) > margin


def test_critical_margins_equal_simulation_on_the_same_noise() -> None:
    critical = critical_margins(CPU, SIGMA, PATHS, seed=22)
    for margin in (0.0, 0.001, 0.0015, 0.003):
        expected = simulate(CPU, margin, SIGMA, PATHS, seed=22).accept_rate
        assert np.mean(critical <= margin) == pytest.approx(expected, abs=2 / PATHS)
        assert predicted_power(CPU, margin, SIGMA, paths=PATHS, seed=22) == pytest.approx(expected, abs=2 / PATHS)


def test_predicted_power_equals_simulation_with_an_uncertain_margin() -> None:
    expected = simulate(CPU, 0.002, SIGMA, PATHS, seed=23, margin_sd=SIGMA / 2)
    assert predicted_power(CPU, 0.002, SIGMA, runs=4) == pytest.approx(expected.accept_rate, abs=0.005)


def test_runs_to_tell() -> None:
    needed = margin_for_power(CPU, SIGMA)
    assert runs_to_tell(CPU, 0.95 * needed, SIGMA) is None
    counts = [runs_to_tell(CPU, k * needed, SIGMA) for k in (1.15, 1.3, 2.0, 4.0)]
    assert all(count is not None for count in counts)
    assert counts == sorted(counts, key=lambda count: -(count or 0))
    assert counts[-1] == 1
    few = counts[0]
    assert few is not None and few > 2
    assert predicted_power(CPU, 1.15 * needed, SIGMA, few, PATHS) >= 0.9
    assert predicted_power(CPU, 1.15 * needed, SIGMA, few - 1, PATHS) < 0.9
    assert runs_to_tell(CPU, 1.15 * needed, SIGMA, max_runs=few - 1) is None


# --- published rules -----------------------------------------------------------------------------

PR_293 = [3.27865, 3.27793, 3.27937, 3.27673, 3.27805]
PR_312 = [3.27765, 3.27965, 3.27675, 3.27978, 3.27961, 3.27999, 3.27696, 3.27746]
PR_312 += [3.27929, 3.27910, 3.28025, 3.28060, 3.27822, 3.27837, 3.27969, 3.27966]


def test_z_rule_examples_on_the_edge() -> None:
    for losses in ([3.276], [3.278] * 4):
        statistic, passed = z_rule(losses, 3.28)
        assert passed
        assert statistic == pytest.approx(0.004, abs=1e-12)
    assert not z_rule([3.27601], 3.28)[1]
    assert not z_rule([3.27801] * 4, 3.28)[1]
    assert z_rule([3.27599], 3.28)[1]


@pytest.mark.parametrize(("losses", "statistic"), [(PR_293, 0.00414567), (PR_312, 0.00424250)])
def test_z_rule_published_records(losses: list[float], statistic: float) -> None:
    measured, passed = z_rule(losses, 3.28)
    assert measured == pytest.approx(statistic, abs=5e-9)
    assert passed


def test_z_rule_rejects_crashes_and_takes_other_thresholds() -> None:
    assert z_rule([3.2, math.inf], 3.28) == (-math.inf, False)
    assert z_rule([3.2, math.nan], 3.28) == (-math.inf, False)
    assert z_rule([3.275], 3.28, threshold=0.005)[1]
    assert not z_rule([3.2751], 3.28, threshold=0.005)[1]
    with pytest.raises(ValueError, match="at least one"):
        z_rule([], 3.28)


def test_upper_sd() -> None:
    pooled, upper = upper_sd([(0.001, 11), (0.002, 21)], confidence=0.9)
    assert pooled == pytest.approx(math.sqrt((10 * 1e-6 + 20 * 4e-6) / 30))
    assert upper == pytest.approx(pooled * math.sqrt(30 / scipy_stats.chi2.ppf(0.1, 30)))
    assert upper_sd([(0.001, 11), (math.pi, 1)]) == upper_sd([(0.001, 11)])
    for groups in ([], [(0.001, 1)], [(math.nan, 5)]):
        with pytest.raises(ValueError, match="group"):
            upper_sd(groups)


def test_upper_sd_covers_at_its_confidence() -> None:
    sds = np.random.default_rng(31).normal(size=(2000, 20)).std(axis=1, ddof=1)
    covered = np.mean([upper_sd([(float(sd), 20)])[1] >= 1.0 for sd in sds])
    assert covered == pytest.approx(0.9, abs=0.025)


def test_scipy_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, nanogpt_env.stats; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
