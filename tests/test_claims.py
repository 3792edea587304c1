"""Which claim an agent's own runs support."""

import math
import time

import pytest
from helpers import SIGMA, TARGET, make_run, make_tier

from nanogpt_env.claims import POWER, advise, curve
from nanogpt_env.stats import critical_margins, predicted_power
from nanogpt_env.types import RunResult, SandboxInfo

STEPS = (50, 100, 150, 200)


def run(margin, slope=0.001, steps=STEPS, **fields):
    """Loss falls by `slope` nats a step and ends `margin` below the target."""
    end = steps[-1]
    return make_run([(s, TARGET - margin + slope * (end - s)) for s in steps], **fields)


@pytest.fixture(scope="module")
def tier():
    return make_tier()


def claim(tier, *runs):
    return advise(tier, list(runs)).claim


def test_no_runs(tier):
    advice = advise(tier, [])
    assert advice.claim is None
    assert "run it first" in advice.text


def test_a_good_run_is_claimed_at_the_first_likely_step(tier):
    advice = advise(tier, [run(0.1)])
    assert 100 < advice.claim < 200
    assert advice.power >= POWER
    margin = 0.1 - 0.001 * (200 - advice.claim)
    test = tier.loss_test()
    assert predicted_power(test, margin, SIGMA, 1) == pytest.approx(advice.power, abs=1e-6)
    assert predicted_power(test, margin - 0.001, SIGMA, 1) < POWER
    assert str(advice.claim) in advice.text


def test_better_runs_are_never_claimed_later(tier):
    claims = [claim(tier, run(margin)) or math.inf for margin in (-0.02, 0.0, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)]
    assert claims == sorted(claims, reverse=True)
    assert claims[0] == math.inf
    assert claims[-1] < claims[-3] < 200


def test_more_runs_of_the_same_are_never_claimed_later(tier):
    claims = [claim(tier, *[run(0.05)] * n) for n in (1, 2, 3, 5, 8)]
    assert claims == sorted(claims, reverse=True)
    assert claims[-1] < claims[0]


def test_runs_are_averaged(tier):
    assert claim(tier, run(0.04), run(0.06)) == claim(tier, run(0.05), run(0.05))


def test_hopeless_runs(tier):
    advice = advise(tier, [run(-0.05)])
    assert advice.claim is None
    assert "no number of runs" in advice.text
    assert "-0.05" in advice.text
    assert "step 200" in advice.text


def test_more_runs_would_tell(tier):
    """A margin that is enough if it is true, but not sure enough from one run."""
    known = float(critical_margins(tier.loss_test(), SIGMA)[int(POWER * 200_000)])
    margin = known + 0.15 * SIGMA
    advice = advise(tier, [run(margin)])
    assert advice.claim is None
    more = int(advice.text.split()[0])
    assert 1 <= more < 64
    assert "more run(s)" in advice.text
    assert claim(tier, *[run(margin)] * (1 + more)) == 200


def test_the_offset_of_the_public_shard_is_taken_off(tier):
    """The runs saw a shard that is harder by 0.03 nat than the hidden one."""
    assert claim(make_tier(shard_offset=0.03), run(0.05)) == claim(tier, run(0.08))


def test_an_offset_that_varies_makes_runs_count_for_less(tier):
    assert claim(make_tier(shard_offset_sd=2 * SIGMA), run(0.08)) > claim(tier, run(0.08))


def test_points_are_shifted_to_the_whole_shard(tier):
    result = make_run([(50, 4.5), (100, 4.1)], final=4.0)
    assert curve(result, "val_public") == ([50, 100], [pytest.approx(4.4), 4.0])
    assert claim(tier, run(0.05, shift=-0.03)) == claim(tier, run(0.08))


def test_one_lucky_point_is_not_claimed(tier):
    """A curve that goes up and down: its best point is no better than its neighbours."""
    steps = range(140, 201, 10)
    rough = make_run([(s, TARGET - 0.02 + 0.001 * (200 - s) - (0.05 if s == 160 else 0)) for s in steps])
    smooth = run(0.02, steps=steps)
    lucky = min(s for s, loss in zip(*curve(rough, "val_public"), strict=True) if loss < TARGET)
    assert lucky > 160
    assert curve(smooth, "val_public")[1] == pytest.approx([TARGET - 0.02 + 0.001 * (200 - s) for s in steps])


def test_only_steps_that_every_run_reached(tier):
    long, short = run(0.2, steps=(50, 100, 150, 200)), run(0.2, steps=(50, 100, 120))
    assert claim(tier, long, short) <= 120
    late = run(0.5, slope=0.0, steps=(150, 200))
    assert claim(tier, late) == 150


def test_a_run_that_stopped_early_is_no_hindrance(tier):
    """A try of 20 steps at the same horizon, before the first evaluated step of the others."""
    short = run(-1.0, steps=(20,))
    full = run(0.1)
    assert advise(tier, [short, full]) == advise(tier, [full])
    assert advise(tier, [full, short]) == advise(tier, [full])
    assert claim(tier, short) is None


def test_a_run_of_one_point(tier):
    assert claim(tier, run(0.2, steps=(30,))) == 30


def test_a_diverging_middle_is_not_claimed(tier):
    wild = make_run([(50, 9.0), (100, math.inf), (150, TARGET - 0.1), (200, TARGET - 0.1)])
    chosen = claim(tier, wild)
    assert chosen is None or chosen >= 150


def test_advice_is_quick(tier):
    """500 steps of which none qualifies: an environment step that trains nothing."""
    points = [(s, TARGET - 0.01 + 1e-6 * (500 - s)) for s in (1, 250, 500)]
    advise(tier, [make_run(points)])
    began = time.monotonic()
    advise(tier, [make_run(points)])
    assert time.monotonic() - began < 1


def test_a_tier_without_calibration_says_so(tier):
    bare = tier.model_copy(update={"calibration": None})
    with pytest.raises(Exception, match="without its calibration"):
        advise(bare, [run(0.1)])


def test_the_helper_makes_complete_runs():
    made = run(0.1)
    assert made.completed
    assert not RunResult(exit_reason="deadline", sandbox=SandboxInfo(name="none", trusted=False)).completed
