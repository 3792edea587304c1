"""The sequence of a verification, with reruns made by hand."""

import json
import math
import re

import pytest
from conftest import TINY
from fakes import LOST, FakeBackend, ran

from nanogpt_env.errors import BackendError
from nanogpt_env.tiers import load_tier
from nanogpt_env.types import Plan
from nanogpt_env.verify import Program, Submission, coarse, verify

TIER = load_tier(TINY)
TEST = TIER.loss_test()
SOURCES = {"optimizer.py": "def configure(params, horizon): ..."}
SUBMISSION = Submission("submission-1", "abc", SOURCES, Plan(steps=60, horizon=80))
START = Program("slow", TIER.record("slow").sources, TIER.value_of("slow"))


def below(*sigmas):
    """Losses of n_max reruns, so many sigmas below the target and then like the last."""
    sigmas += sigmas[-1:] * (TEST.n_max - len(sigmas))
    return [TEST.target - x * TIER.measured.sigma for x in sigmas]


ACCEPTED = below(16, 15.5, 15, 16, 15.5, 15)
FUTILE = below(-3, 0)
UNDECIDED = below(0.75, 0.85, 0.65, 0.8, 0.7, 0.75)
LATE_FUTILE = below(1.7, 1.4, -1.4, -1.7, 0)


def one_slot(tier=TIER):
    table = tier.table.model_copy(
        update={"verification": tier.table.verification.model_copy(update={"slots": 1})},
    )
    return tier.model_copy(update={"table": table})


def scripted(outcomes, **options):
    return FakeBackend(lambda job, number: outcomes[number - 1], **options)


@pytest.mark.parametrize("tier", [TIER, one_slot()], ids=["two slots", "one slot"])
@pytest.mark.parametrize("losses", [ACCEPTED, FUTILE, UNDECIDED, LATE_FUTILE])
def test_the_decision_is_the_sequential_tests(tier, losses):
    backend, told = scripted(losses), []
    verdict, evidence = verify(tier, backend, SUBMISSION, START, START.value, told.append)
    expected = TEST.decide(losses)
    assert expected.outcome in ("accept", "reject")
    assert verdict.accepted is evidence.accepted is (expected.outcome == "accept")
    assert verdict.n == len(evidence.reruns) == expected.n
    assert evidence.reason == expected.reason
    assert list(evidence.reruns) == told
    assert (verdict.value, verdict.claim, verdict.time) == (60.0 if verdict.accepted else None, 60, None)
    assert backend.sessions == 0  # no run is timed
    for i, rerun in enumerate(evidence.reruns):
        assert (rerun.n, rerun.loss, rerun.exit_reason) == (i + 1, losses[i], "completed")
        assert (rerun.role, rerun.session) == ("candidate", 0)
        assert rerun.statistic == TEST.statistic(losses[: i + 1])
        threshold = TEST.threshold(i + 1)
        assert rerun.threshold == (threshold if math.isfinite(threshold) else None)
    assert len(backend.jobs) <= min(tier.table.verification.n_max, expected.n + tier.table.verification.slots - 1)


def test_the_examples_take_every_way_out():
    outcomes = {(d.outcome, d.n) for d in map(TEST.decide, (ACCEPTED, FUTILE, UNDECIDED, LATE_FUTILE))}
    assert ("reject", 1) in outcomes  # at once
    assert ("reject", TEST.n_max) in outcomes  # at the last look
    assert {o for o, _ in outcomes} == {"accept", "reject"}
    assert any(1 < n < TEST.n_max for o, n in outcomes if o == "reject")


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("reason", ["candidate_error", "nonfinite_loss", "deadline", "rule_too_slow", "cancelled"])
def test_a_fault_of_the_candidate_in_any_rerun_is_a_rejection(k, reason):
    def script(job, number):
        return ran(job, 4.0, reason=reason, detail="it broke") if number == k else 4.5

    verdict, evidence = verify(one_slot(), FakeBackend(script), SUBMISSION, START, START.value)
    assert not verdict.accepted
    assert verdict.n == len(evidence.reruns) == k
    assert evidence.reruns[-1].loss is None
    assert evidence.reruns[-1].exit_reason == reason
    assert "it broke" in evidence.reason
    assert verdict.coarse_loss is None
    assert verdict.reason == f"rejected: a rerun did not complete ({reason})"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_failure_of_ours_is_redone_once_on_a_fresh_seed(k):
    backend = scripted([*ACCEPTED[: k - 1], LOST, *ACCEPTED])
    verdict, evidence = verify(one_slot(), backend, SUBMISSION, START, START.value)
    assert verdict.accepted
    seeds = [job.seed for job in backend.jobs]
    assert len(set(seeds)) == len(seeds) == verdict.n + 1
    assert [r.seed for r in evidence.reruns] == seeds[: k - 1] + seeds[k:]


@pytest.mark.parametrize("tier", [TIER, one_slot()], ids=["two slots", "one slot"])
def test_two_failures_of_ours_in_a_row_are_raised_and_nothing_goes_on(tier):
    # with two slots the starts are: reruns 1 and 2, then 1 again
    outcomes = [LOST, 4.5, LOST, 4.5] if tier is TIER else [LOST, LOST, 4.5]
    backend, told = scripted(outcomes, hold={2} if tier is TIER else ()), []
    with pytest.raises(BackendError, match="node lost"):
        verify(tier, backend, SUBMISSION, START, START.value, told.append)
    assert told == []
    assert all(run.done() for run in backend.runs)
    assert len(backend.jobs) == (3 if tier is TIER else 2)


def test_failures_of_ours_in_different_reruns_are_each_redone():
    verdict, _ = verify(one_slot(), scripted([LOST, 4.5, LOST, *ACCEPTED]), SUBMISSION, START, START.value)
    assert verdict.accepted


@pytest.mark.parametrize("fails", [{1}, {2}])
def test_a_start_that_fails_once_is_tried_again(fails):
    def script(job, number):
        if number in fails:
            raise LOST
        return 4.5

    assert verify(TIER, FakeBackend(script), SUBMISSION, START, START.value)[0].accepted


def test_a_start_that_fails_twice_is_raised_and_the_other_rerun_cancelled():
    def script(job, number):
        if number > 1:
            raise LOST
        return 4.5

    backend = FakeBackend(script, hold={1})
    with pytest.raises(BackendError, match="node lost"):
        verify(TIER, backend, SUBMISSION, START, START.value)
    assert backend.runs[0].cancelled


def test_a_candidate_cannot_have_its_fault_redone():
    backend = FakeBackend(lambda job, number: ran(job, 4.0, reason="candidate_exited"))
    assert not verify(one_slot(), backend, SUBMISSION, START, START.value)[0].accepted
    assert len(backend.jobs) == 1


def test_reruns_that_end_out_of_order_are_looked_at_in_order():
    losses = [4.51, 4.52, 4.53, 4.54, 4.55, 4.56]
    backend = scripted(losses, hold={1, 3})

    def release(what, handle):
        n = int(what.removeprefix("rerun "))
        if n in (1, 3) and len(backend.runs) > n:  # the later rerun has ended by now
            handle.held = False

    verdict, evidence = verify(TIER, backend, SUBMISSION, START, START.value, on_progress=release)
    assert verdict.n >= 3
    assert [r.n for r in evidence.reruns] == list(range(1, verdict.n + 1))
    assert [r.loss for r in evidence.reruns] == losses[: verdict.n]
    assert [r.seed for r in evidence.reruns] == [job.seed for job in backend.jobs][: verdict.n]


def test_no_more_reruns_at_once_than_slots():
    for tier, slots in ((TIER, 2), (one_slot(), 1)):
        backend = scripted(UNDECIDED)
        assert verify(tier, backend, SUBMISSION, START, START.value)[0].n == TEST.n_max
        assert backend.most_at_once == slots
        assert len(backend.jobs) == tier.table.verification.n_max


def test_what_is_left_over_is_cancelled_and_its_seconds_are_counted():
    n = TEST.decide(ACCEPTED).n
    backend = FakeBackend(lambda job, number: ran(job, ACCEPTED[number - 1], 1.5), hold={n + 1})
    verdict, evidence = verify(TIER, backend, SUBMISSION, START, START.value)
    assert len(backend.jobs) == n + 1
    assert backend.runs[-1].cancelled
    assert verdict.device_seconds == pytest.approx(1.5 * n + 0.25, abs=0.051)  # given to 0.1 s
    assert len(evidence.reruns) == n


def test_a_leftover_that_fails_on_our_side_changes_nothing():
    n = TEST.decide(ACCEPTED).n
    verdict, _ = verify(TIER, scripted([*ACCEPTED[:n], LOST]), SUBMISSION, START, START.value)
    assert verdict.accepted
    assert verdict.device_seconds == n


@pytest.mark.parametrize("tier", [TIER, one_slot()], ids=["two slots", "one slot"])
def test_an_interrupt_cancels_every_rerun_also_the_one_waited_for(tier):
    backend = scripted(ACCEPTED, hold={1, 2})

    def interrupt(what, handle):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(tier, backend, SUBMISSION, START, START.value, on_progress=interrupt)
    assert len(backend.runs) == tier.table.verification.slots
    assert all(run.cancelled for run in backend.runs)


def test_seeds_are_secret_fresh_and_all_different():
    backend = scripted(UNDECIDED * 2)
    seeds = [r.seed for _ in range(2) for r in verify(TIER, backend, SUBMISSION, START, START.value)[1].reruns]
    assert len(seeds) == len(set(seeds)) == 2 * TEST.n_max
    assert all(re.fullmatch(r"[0-9a-f]{64}", seed) for seed in seeds)


def test_the_job_is_the_submission_on_the_hidden_shard():
    backend = scripted(ACCEPTED)
    verify(TIER, backend, SUBMISSION, START, START.value)
    for job in backend.jobs:
        assert job.final_shards == (TIER.table.data.hidden,) == ("val_hidden",)
        assert (job.source, job.steps, job.horizon) == (SOURCES["optimizer.py"], 60, 80)
        assert job.train_shards == ("train",)
        assert job.limits == TIER.limits()
    assert len({job.model_dump_json(exclude={"seed", "cores"}) for job in backend.jobs}) == 1


def test_only_the_hidden_loss_counts():
    def script(job, number):
        return ran(job, 4.5, val_losses={"val_hidden": 5.2, "val_public": 4.0})

    assert not verify(TIER, FakeBackend(script), SUBMISSION, START, START.value)[0].accepted


@pytest.mark.parametrize(
    ("losses", "shown"),
    [([5.0012], 5.0), ([4.9974], 4.995), ([4.9976], 5.0), ([4.9, 4.91], 4.905), ([4.9, math.inf], None)],
)
def test_the_loss_shown_is_coarse(losses, shown):
    assert coarse(losses) == shown


@pytest.mark.parametrize("losses", [ACCEPTED, FUTILE, UNDECIDED])
def test_a_verdict_tells_the_decision_and_no_seed_or_loss(losses):
    exact = [loss + 0.00037 for loss in losses]
    verdict, evidence = verify(TIER, scripted(exact), SUBMISSION, START, START.value)
    assert set(verdict.model_dump()) == {
        "accepted", "audit", "value", "claim", "horizon", "n", "reason", "coarse_loss", "time", "device_seconds",
        "trusted", "submission", "cached", "opinions", "vetoed_by",
    }  # fmt: skip
    text = json.dumps(verdict.model_dump())
    for rerun in evidence.reruns:
        assert rerun.seed[:8] not in text
        assert f"{rerun.loss:.4f}" not in text
    assert verdict.coarse_loss == pytest.approx(sum(exact[: verdict.n]) / verdict.n, abs=0.0026)
    assert round(verdict.coarse_loss / 0.005, 6) == round(verdict.coarse_loss / 0.005)
    assert verdict.reason in (  # fixed words, that tell no more than the decision
        "accepted: the reruns' mean loss is below the target",
        "rejected: the reruns do not show a mean loss below the target",
    )


def test_the_evidence_holds_all_that_the_verdict_rests_on():
    verdict, evidence = verify(TIER, scripted(ACCEPTED), SUBMISSION, START, START.value)
    assert (evidence.submission, evidence.snapshot, evidence.sources) == ("submission-1", "abc", SOURCES)
    assert (evidence.tier, evidence.claim, evidence.horizon) == ("tiny-steps", 60, 80)
    assert evidence.tests == {"loss": {k: float(v) for k, v in vars(TEST).items()}}
    assert (evidence.start, evidence.time) == ("slow", None)
    mean = sum(ACCEPTED[: verdict.n]) / verdict.n
    z = (TEST.target - mean) * math.sqrt(verdict.n) / TIER.measured.sigma
    assert evidence.z_statistic == pytest.approx(z)
    assert evidence.versions == {"torch": "0"}
    assert evidence.hardware == {"cpu": "none"}
    assert evidence.sandbox.name == "fake"
    assert (verdict.submission, verdict.claim, verdict.horizon) == ("submission-1", 60, 80)


@pytest.mark.parametrize("trusted", [True, False])
def test_trust_is_that_of_the_sandbox(trusted):
    backend = FakeBackend(lambda job, number: ran(job, 4.5, trusted=trusted))
    assert verify(TIER, backend, SUBMISSION, START, START.value)[0].trusted is trusted
