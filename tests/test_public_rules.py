"""The public tables' rules against figures that were published."""

import math

import pytest

from nanogpt_env.human import load_table
from nanogpt_env.public_rules import (
    FORMER_RULE,
    RULE,
    SLOPE,
    Group,
    judge_again,
    pairwise_p,
    pairwise_statistic,
    t_test,
)

PR_293 = [3.27865, 3.27793, 3.27937, 3.27673, 3.27805]
PR_312 = [3.27765, 3.27965, 3.27675, 3.27978, 3.27961, 3.27999, 3.27696, 3.27746, 3.27929, 3.27910, 3.28025, 3.28060,
          3.27822, 3.27837, 3.27969, 3.27966]  # fmt: skip
PRIME = [3.27695, 3.27852, 3.27789, 3.27749, 3.27853, 3.27804, 3.27869, 3.27817, 3.27936, 3.27852, 3.27885, 3.27948,
         3.28112, 3.27732, 3.27631, 3.27986]  # fmt: skip
STATION = [3.2779, 3.2788, 3.2791, 3.2752, 3.2752, 3.2784, 3.2779, 3.2784, 3.2777, 3.2780, 3.2804, 3.2806, 3.2786,
           3.2777, 3.2776]  # fmt: skip


def mean(losses):
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize(
    ("value", "n", "passes"),
    [(3.276, 1, True), (3.278, 4, True), (3.2760001, 1, False), (3.2780001, 4, False), (3.2759999, 1, True)],
)
def test_the_target_rule_at_its_limit(value, n, passes):
    assert RULE.passes(value, n) == passes


@pytest.mark.parametrize(("value", "n"), [(3.275, 1), (3.2775, 4)])
def test_the_former_rule_at_its_limit(value, n):
    assert FORMER_RULE.passes(value, n) and not FORMER_RULE.passes(value + 1e-6, n)


@pytest.mark.parametrize(
    ("losses", "statistic"),
    [(PR_293, 0.00414567), (PR_312, 0.00424250), (PRIME, 0.006225), ([3.27920, 3.27811, 3.27522, 3.27787], 0.0048)],
    ids=["A2", "A3", "P1", "A9"],
)
def test_published_statistics(losses, statistic):
    assert RULE.statistic(mean(losses), len(losses)) == pytest.approx(statistic, abs=6e-9)
    assert RULE.passes(mean(losses), len(losses))


def test_the_p_value_of_the_prime_claim():
    assert RULE.statistic(mean(PRIME), 16) / RULE.sigma == pytest.approx(4.78846, abs=1e-5)
    assert RULE.p(mean(PRIME), 16) == pytest.approx(8.4032e-7, rel=1e-4)


def test_of_the_whole_table_exactly_the_marked_rows_fail():
    judged = judge_again(load_table("optimization"))
    assert len(judged) == 46 and not any(row.differs for row in judged)
    assert [row.record.number for row in judged if not row.passes] == [1, 2, 3]
    assert all(row.statistic == pytest.approx(row.record.z_margin, abs=1e-5) for row in judged)


def test_under_the_former_rule_more_rows_fail():
    failing = [row.record.number for row in judge_again(load_table("optimization"), FORMER_RULE) if not row.passes]
    assert set(failing) > {1, 2, 3}


def row(number):
    found = next(r for r in load_table("optimization").records if r.number == number)
    return Group(found.value, found.mean_val_loss, found.n_runs)


@pytest.mark.parametrize(
    ("old", "new", "statistic", "p"),
    [
        (11, 13, 0.0016745, 0.0989),
        (8, 13, 0.0024597, 0.0292),
        (9, 11, -0.000635, 0.687),
        (14, 16, 0.000531, 0.342),
        (30, 34, 0.001212, 0.1755),
    ],
    ids=["B1", "B2-table", "B4", "B5", "B6"],
)
def test_published_pairs(old, new, statistic, p):
    found = pairwise_statistic(row(old), row(new))
    assert found == pytest.approx(statistic, abs=6e-7) and found < RULE.margin
    assert pairwise_p(row(old), row(new)) == pytest.approx(p, abs=6e-4)


def test_a_published_pair_that_differs():
    """B3: 50 steps fewer at almost the same loss."""
    assert pairwise_statistic(row(6), row(12)) == pytest.approx(0.0064827, abs=5e-7)
    assert pairwise_statistic(row(6), row(12)) >= RULE.margin


def test_the_readme_and_its_table_do_not_agree_on_one_pair():
    """B2: the text's 0.0027 takes n = 10 and 16, the table's p n = 10 and 10, which both rows have."""
    old, new = row(8), row(13)
    assert (old.n, new.n) == (10, 10)
    assert pairwise_statistic(old._replace(n=16), new) == pytest.approx(0.0027, abs=5e-5)


def test_the_pair_of_equal_steps():
    old, new = Group(3125, 3.2790, row(14).n), Group(3125, 3.2784, row(16).n)
    assert pairwise_statistic(old, new) == pytest.approx(0.000980, abs=5e-7)
    assert pairwise_p(old, new) == pytest.approx(0.2255, abs=5e-5)


def test_the_slope_in_steps():
    assert pytest.approx(155.6, abs=0.05) == 0.0070 / SLOPE * 100
    assert pytest.approx(31.1, abs=0.05) == 0.0014 / SLOPE * 100


def test_published_t_tests():
    t, p = t_test(STATION)
    assert p == pytest.approx(0.00010673, abs=5e-9) and t < 0
    assert t_test([3.2789, 3.2790])[1] == pytest.approx(0.0151, abs=5e-5)
    # 80 losses by their moments: mean 3.2791425, sd 0.00191025
    assert (3.2791425 - 3.28) * math.sqrt(80) / 0.00191025 == pytest.approx(-4.0150, abs=5e-5)


@pytest.mark.parametrize("losses", [[3.27], [3.27, 3.27, 3.27], []])
def test_a_t_test_of_losses_that_do_not_differ_is_none(losses):
    with pytest.raises(ValueError, match="differ"):
        t_test(losses)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one run"):
        RULE.statistic(3.27, 0)
