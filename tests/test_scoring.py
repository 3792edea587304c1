"""What a number of steps or seconds is worth, against published figures."""

import math
from itertools import pairwise

import pytest

from nanogpt_env.scoring import recovered, recovered_log, share

# NanoGPT-Bench: start - anchor in seconds, and published shares with the seconds they stand for.
GAP = 63.2192
PUBLISHED = [(0.093, 5.8794), (0.086, 5.4369), (0.082, 5.1840)]


@pytest.mark.parametrize(("percent", "seconds"), PUBLISHED)
@pytest.mark.parametrize("start", [GAP + 60.0, 180.0, 1e4])
def test_published_shares(percent, seconds, start):
    assert recovered(start, start - GAP, start - seconds) == pytest.approx(percent, abs=1e-6)
    # the published percentages are rounded to 0.1, that is half of 0.1 % of the gap either way
    assert abs(percent * GAP - seconds) < 0.0316


def test_published_share_without_the_increments_of_ai():
    assert recovered(100, 100 - 59.1358, 100 - 5.8794) == pytest.approx(0.0994, abs=5e-5)


@pytest.mark.parametrize(
    ("t0", "t1", "t", "fsr"),
    [(1301740, 949528, 925150, 1.0692), (1301740, 949528, 922823, 1.0758), (2968348, 2209926, 2183229, 1.0352),
     (949528, 766259, 765102, 1.0063), (317839, 289805, 289350, 1.0162), (505531, 477150, 471196, 1.2098)],
)  # fmt: skip
def test_published_fractions_of_speedup_recovered(t0, t1, t, fsr):
    """The Automated LLM Speedrunning Benchmark, milliseconds."""
    assert recovered(t0, t1, t) == pytest.approx(fsr, abs=5e-5)


@pytest.mark.parametrize("form", ["linear", "log"])
def test_ends_of_the_scale(form):
    assert share(form, 266, 141, 266) == 0
    assert share(form, 266, 141, 141) == 1
    assert share(form, 266, 141, 300) < 0
    assert share(form, 266, 141, 100) > 1


def test_linear_and_log_between():
    assert share("linear", 400, 100, 200) == pytest.approx(2 / 3)
    assert share("log", 400, 100, 200) == pytest.approx(0.5)
    assert recovered_log(266, 141, 200) == pytest.approx(math.log(266 / 200) / math.log(266 / 141))


@pytest.mark.parametrize("form", ["linear", "log"])
def test_increments_add_up(form):
    steps = [266, 240, 199, 142, 130]
    rewards = [share(form, 266, 141, b) - share(form, 266, 141, a) for a, b in pairwise(steps)]
    assert sum(rewards) == pytest.approx(share(form, 266, 141, 130))
    assert min(rewards) > 0


@pytest.mark.parametrize("form", ["linear", "log"])
@pytest.mark.parametrize(("start", "anchor"), [(141, 266), (141, 141), (5, 0), (5, -1), (math.nan, 1), (1, math.nan)])
def test_start_must_be_above_anchor(form, start, anchor):
    with pytest.raises(ValueError, match="start > anchor > 0"):
        share(form, start, anchor, 100)


@pytest.mark.parametrize("value", [0, -1])
def test_log_needs_a_positive_value(value):
    with pytest.raises(ValueError, match="positive"):
        recovered_log(266, 141, value)


@pytest.mark.parametrize("form", ["", "Linear", "ratio", None])
def test_an_unknown_form_is_no_form(form):
    with pytest.raises(ValueError, match="linear or log"):
        share(form, 266, 141, 200)
