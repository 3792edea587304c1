"""Meters: reserved before use, charged for what was used, never given back."""

import math
from types import SimpleNamespace

import pytest

from nanogpt_env.budget import METERS, RUN_METERS, Budget
from nanogpt_env.errors import BudgetError

LIMITS = {
    "device_seconds": 900, "flops": 2e13, "tokens": 2e7, "runs": 60, "submissions": 8, "episode_steps": 400,
    "wall_seconds": 14400,
}  # fmt: skip


@pytest.fixture
def clock():
    return SimpleNamespace(now=1000.0)


@pytest.fixture
def budget(clock):
    return Budget(LIMITS, lambda: clock.now)


def test_begins_full(budget):
    assert set(METERS) == set(LIMITS)
    for meter in METERS:
        assert budget.left(meter) == LIMITS[meter]
        assert budget.spent(meter) == 0
    assert budget.exhausted() == ""


@pytest.mark.parametrize(
    "limits", [{}, {**LIMITS, "gpu_hours": 1}, {k: v for k, v in LIMITS.items() if k != "runs"}], ids=str
)
def test_every_meter_is_named(limits):
    with pytest.raises(ValueError, match="at odds"):
        Budget(limits)


def test_reserve_then_settle_for_less(budget):
    reservation = budget.reserve({"device_seconds": 120, "runs": 1})
    assert budget.left("device_seconds") == 780
    assert budget.spent("device_seconds") == 0
    budget.settle(reservation, {"device_seconds": 11.5, "runs": 1, "tokens": 5})
    assert budget.left("device_seconds") == 888.5
    assert budget.left("runs") == 59
    assert budget.spent("tokens") == 5


def test_a_reservation_keeps_others_from_the_same_allowance(budget):
    first = budget.reserve({"device_seconds": 800})
    with pytest.raises(BudgetError, match=r"device_seconds: 101 needed, 100 left of 900"):
        budget.reserve({"device_seconds": 101})
    second = budget.reserve({"device_seconds": 100})
    assert budget.left("device_seconds") == 0
    budget.settle(first, {})
    assert budget.left("device_seconds") == 800
    budget.settle(second, {"device_seconds": 100})
    assert budget.left("device_seconds") == 800


def test_a_refused_reservation_reserves_nothing(budget):
    """The meter that cannot pay comes last."""
    with pytest.raises(BudgetError, match="runs"):
        budget.reserve({"device_seconds": 100, "tokens": 100, "runs": 61})
    assert all(budget.left(m) == LIMITS[m] for m in METERS)


def test_settling_with_nothing_is_a_refund(budget):
    budget.settle(budget.reserve({"submissions": 8, "runs": 1}), {})
    assert budget.left("submissions") == 8
    assert budget.left("runs") == 60


def test_what_a_kill_takes_longer_is_charged(budget):
    budget.settle(budget.reserve({"device_seconds": 900}), {"device_seconds": 903})
    assert budget.spent("device_seconds") == 903
    assert budget.left("device_seconds") == 0
    with pytest.raises(BudgetError, match="device_seconds"):
        budget.reserve({"device_seconds": 1e-6})


def test_the_last_of_many_uneven_reservations_fits():
    """Rounding of a sum must not refuse what is left."""
    budget = Budget({**LIMITS, "device_seconds": 0.3})
    for amount in (0.1, 0.1):
        budget.settle(budget.reserve({"device_seconds": amount}), {"device_seconds": amount})
    budget.reserve({"device_seconds": budget.left("device_seconds")})
    assert budget.left("device_seconds") == 0


@pytest.mark.parametrize("meter", ["episode_steps", "submissions"])
def test_an_episode_ends_when_its_own_meters_are_spent(budget, meter):
    for _ in range(int(LIMITS[meter]) - 1):
        budget.charge(meter)
        assert budget.exhausted() == ""
    budget.charge(meter)
    assert budget.exhausted() == meter


@pytest.mark.parametrize("meter", RUN_METERS)
def test_a_spent_research_meter_ends_nothing(budget, meter):
    budget.charge(meter, LIMITS[meter] * 2)
    assert budget.left(meter) == 0
    assert budget.exhausted() == ""


def test_wall_time_is_the_clocks(budget, clock):
    clock.now += 14399
    assert budget.spent("wall_seconds") == 14399
    assert budget.exhausted() == ""
    clock.now += 1
    assert budget.left("wall_seconds") == 0
    assert budget.exhausted() == "wall_seconds"


def test_status(budget, clock):
    budget.reserve({"runs": 2})
    budget.charge("runs")
    clock.now += 10
    status = budget.status()
    assert list(status) == list(METERS)
    assert status["runs"] == {"limit": 60, "spent": 1, "left": 57}
    assert status["wall_seconds"] == {"limit": 14400, "spent": 10, "left": 14390}
    assert all(math.isfinite(v) for s in status.values() for v in s.values())


def test_the_budget_keeps_its_own_limits():
    limits = dict(LIMITS)
    budget = Budget(limits)
    limits["runs"] = 1e9
    assert budget.left("runs") == 60
