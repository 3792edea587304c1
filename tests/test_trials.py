"""What a verification runs next and what it says, fed with losses and seconds made by hand."""

import math

import pytest
from helpers import BOUNDARY, LEVEL, SIGMA, TARGET

from nanogpt_env.stats import SequentialTest
from nanogpt_env.timing import PairTest, order
from nanogpt_env.trials import MAX_SESSIONS, LossTrial, TimeTrial, Turn

LOSS_TEST = SequentialTest.for_tier(TARGET, SIGMA, LEVEL, 5, 14, BOUNDARY)
PAIR_TEST = PairTest(pairs=5, level=LEVEL, floor=0.015)
GOOD, BAD = TARGET - 0.09, TARGET + 0.03


def undecided(n):
    """Losses that the test looks at more than five of."""
    return TARGET - 1.2 * SIGMA + SIGMA * (-1) ** n


def trial(start=1.0, best=1.0):
    return TimeTrial(LOSS_TEST, PAIR_TEST, start, best)


def play(trial, loss=lambda n: GOOD, candidate=lambda turn: 20.0, start=lambda turn: 30.0, most=100):
    """Run a trial to its end; the turns that it asked for."""
    turns = []
    for _ in range(most):
        if trial.outcome != "continue":
            return turns
        turn = trial.turn()
        turns.append(turn)
        n = sum(t.role == "candidate" for t in turns)
        if turn.role == "candidate":
            trial.add(turn, loss(n), candidate(turn))
        else:
            trial.add(turn, BAD, start(turn))
    raise AssertionError("the trial does not end")


def test_on_the_steps_track_it_is_the_sequential_test():
    for losses in ([GOOD] * 5, [BAD], [undecided(n) for n in range(14)], [GOOD, math.inf]):
        t = LossTrial(LOSS_TEST, 140)
        for loss in losses[: LOSS_TEST.decide(losses).n]:
            assert t.outcome == "continue"
            assert t.turn() == Turn("candidate")
            t.add(t.turn(), loss, 1.0)
        assert t.outcome == LOSS_TEST.decide(losses).outcome
        assert t.reason == LOSS_TEST.decide(losses).reason
    assert (t.value(), t.timing, t.parallel) == (140, None, True)


def test_a_session_begins_with_a_warm_up_and_goes_in_abba_order():
    turns = play(trial())
    assert turns[0] == Turn("warm-up", 1)
    expected = ["candidate" if ours else "start" for pair in order(5) for ours in pair]
    assert [t.role for t in turns[1:]] == expected
    assert expected[:4] == ["start", "candidate", "candidate", "start"]
    assert {t.session for t in turns} == {1}


def test_faster_and_below_the_target_is_accepted_at_the_bound():
    t = trial()
    play(t)
    assert t.outcome == "accept"
    assert t.losses == [GOOD] * 5  # the start record's are not among them
    upper = math.log(20 / 30) + PAIR_TEST.half_width
    assert t.timing.ratio == pytest.approx(20 / 30)
    assert t.timing.bound == pytest.approx(math.exp(upper))
    assert t.timing.seconds == pytest.approx(20)
    assert t.value() == pytest.approx(math.exp(upper))
    assert "faster" in t.shown


def test_what_is_paid_is_measured_against_the_start_record_and_must_beat_the_best():
    """Ratio 2/3, at most about 0.7: better than 0.8, not than 0.68, whatever came between."""
    upper = math.exp(math.log(20 / 30) + PAIR_TEST.half_width)
    for start, best, accepted in ((1.0, 0.8, True), (1.0, 0.68, False), (0.5, 0.4, True), (0.5, 0.34, False)):
        t = trial(start, best)
        play(t)
        assert (t.outcome == "accept") is accepted
        if accepted:
            assert t.value() == pytest.approx(start * upper)
            assert (t.timing.ratio, t.timing.bound) == (pytest.approx(20 / 30), pytest.approx(upper))


@pytest.mark.parametrize("seconds", [30.0, 29.5, 31.0])
def test_not_shown_faster_is_a_rejection_whatever_the_loss(seconds):
    t = trial()
    play(t, candidate=lambda turn: seconds)
    assert t.outcome == "reject"
    assert "faster" in t.not_shown


def test_a_hopeless_candidate_is_given_up_early():
    t = trial()
    turns = play(t, candidate=lambda turn: 40.0)
    assert len(turns) == 3
    assert t.outcome == "reject"
    assert "given up after 1 of 5 pairs" in t.reason
    assert t.timing is None


def test_faster_but_above_the_target_is_a_rejection():
    t = trial()
    turns = play(t, loss=lambda n: BAD)
    assert t.outcome == "reject"
    assert [x.role for x in turns] == ["warm-up", "start", "candidate"]  # no time is spent on what is lost
    assert "mean loss" in t.not_shown


def test_an_open_loss_is_decided_by_further_runs_of_the_candidate_in_the_same_session():
    t = trial()
    turns = play(t, loss=undecided)
    assert len(turns) > 11
    assert set(turns[11:]) == {Turn("candidate", 1)}
    assert t.outcome == LOSS_TEST.decide(t.losses).outcome
    assert t.timing.ratio == pytest.approx(20 / 30)
    assert not t.parallel


@pytest.mark.parametrize(("seconds", "outcome"), [(20.5, "accept"), (22.5, "reject"), (60.0, "reject")])
def test_further_runs_may_take_no_longer_than_what_is_paid(seconds, outcome):
    """A program that trains longer once it is no longer paired, and so has the better loss."""
    t, count = trial(), 0
    assert 20.5 < 30 * math.exp(math.log(20 / 30) + PAIR_TEST.half_width) < 22.5

    def loss(n):
        return undecided(n) if n <= 5 else GOOD

    def candidate(turn):
        nonlocal count
        count += 1
        return 20.0 if count <= 5 else seconds

    play(t, loss=loss, candidate=candidate)
    assert t.outcome == outcome
    assert len(t.losses) > 5
    if outcome == "reject":
        assert "further runs took longer" in t.reason
        assert "not the same" in t.not_shown


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_run_that_does_not_complete_is_a_rejection(k):
    t = trial()
    play(t, loss=lambda n: math.inf if n == k else GOOD)
    assert t.outcome == "reject"
    assert len(t.losses) == k
    assert "no finite loss" in t.reason or "no finite loss" in LOSS_TEST.decide(t.losses).reason


def drifting(trial):
    """A start record that gets slower from run to run of a session."""
    return lambda turn: 30.0 * 1.05 ** len(trial._start)


def test_a_start_record_that_drifts_voids_the_session_and_its_losses_count():
    t = trial()
    turns = play(t, start=lambda turn: 30.0 if turn.session > 1 else drifting(t)(turn))
    assert [x for x in turns if x.role == "warm-up"] == [Turn("warm-up", 1), Turn("warm-up", 2)]
    assert t.outcome == "accept"
    assert t.losses == [GOOD] * 5  # decided in the first session; what came later was not looked at
    assert t.timing.ratio == pytest.approx(20 / 30)  # of the second session alone


@pytest.mark.parametrize("second", [math.inf, TARGET + 0.01])
def test_after_a_void_session_the_runs_that_are_timed_must_still_be_good(second):
    """The loss test has accepted in the first session: a program that knows so, and saves at once from then on."""
    t = trial()
    count = 0

    def loss(n):
        return GOOD if n <= 5 else second

    def candidate(turn):
        nonlocal count
        count += 1
        return 20.0 if count <= 5 else 0.5

    play(t, loss, candidate, start=lambda turn: 30.0 if turn.session > 1 else drifting(t)(turn))
    assert t.losses[:5] == [GOOD] * 5
    assert t.outcome == "reject"
    assert "no finite loss" in t.reason or "not below the target" in t.reason


def test_a_host_too_unsteady_to_time_anything_decides_nothing():
    t = trial()
    turns = play(t, start=lambda turn: drifting(t)(turn))
    assert t.outcome == "void"
    assert len(turns) == MAX_SESSIONS * 11
    assert f"{MAX_SESSIONS} sessions" in t.reason


def test_void_sessions_give_no_second_chance_on_the_loss():
    t = trial()
    play(t, loss=lambda n: BAD if n > 6 else undecided(n), start=lambda turn: drifting(t)(turn))
    assert t.outcome == "reject"


def test_the_losses_looked_at_do_not_depend_on_how_the_times_come_out():
    """Sessions stop looking at losses where the loss test alone would."""
    losses = [TARGET - 0.6 * SIGMA + SIGMA * math.sin(7 * n) for n in range(1, 40)]
    t = trial()
    play(t, loss=lambda n: losses[n - 1], start=lambda turn: drifting(t)(turn) if turn.session < 3 else 30.0)
    n = len(t.losses)
    assert t.losses == losses[:n]
    assert LOSS_TEST.decide(losses).n == n
