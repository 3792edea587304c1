"""The wallclock track in the package: tier, verification, episode, ledger. Scripted runs; the last test trains."""

import json
import math
import shutil
from pathlib import Path

import pytest
from fakes import LOST, FakeBackend
from helpers import edit

from nanogpt_env import EditFile, ReadFile, Run, Speedrun, Submit, WriteFile
from nanogpt_env.agents import LadderAgent, play
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.errors import ActionError, BackendError, TierError
from nanogpt_env.human import load_table
from nanogpt_env.ledger import read_ledger
from nanogpt_env.replay import replay
from nanogpt_env.tables import HostTiming, Human
from nanogpt_env.tiers import host_timing_path, load_tier, write_calibration
from nanogpt_env.tracks import WallclockTier
from nanogpt_env.trials import MAX_SESSIONS
from nanogpt_env.types import RunResult, SandboxInfo
from nanogpt_env.verify import Program, Submission, verify

TINY = Path(__file__).parent / "tiny-wallclock"
TIER = load_tier(TINY)
SLOW, FAST = (TIER.records[name].sources["train.py"] for name in ("slow", "fast"))
GOOD = TIER.table.training.target - 0.5
SUBMISSION = Submission("submission-1", "abc", {"train.py": FAST}, None)
START = Program("slow", {"train.py": SLOW}, 1.0)
PAIRS = TIER.table.verification.pairs


def timed(job, loss, seconds, **changes):
    """What a run of `job` yields that trains for `seconds`."""
    fields = {
        "exit_reason": "completed",
        "val_losses": dict.fromkeys(job.final_shards, loss),
        "steps": 10,
        "tokens": job.tokens,
        "device_seconds": seconds + 1,
        "train_seconds": seconds,
        "sandbox": SandboxInfo(name="fake", version="1", trusted=True),
    }
    return RunResult(**(fields | changes))


def backend(times, loss=lambda number: GOOD, **options):
    """`times` maps a source to its training seconds, or to a function of the number of the start."""

    def script(job, number):
        seconds = times[job.sources["train.py"]]
        return timed(job, loss(number), seconds(number) if callable(seconds) else seconds)

    return FakeBackend(script, **options)


def make(tmp_path, back, **options):
    env = Speedrun(TINY, backend=back, state_dir=tmp_path / "ledgers", **options)
    env.reset()
    return env


def lines(env, kind):
    return [line for line in read_ledger(env.episode.ledger.path)[0] if line["kind"] == kind]


# --- the tier ---


def test_a_wallclock_tier_is_one(tmp_path):
    assert isinstance(TIER, WallclockTier)
    assert (TIER.files, TIER.value_of("slow")) == (("train.py",), 1.0)
    assert TIER.value_of("fast") == pytest.approx(0.3 * math.exp(TIER.pair_test().half_width))
    job = TIER.job({"train.py": "pass"}, None, "seed", ("val_hidden",))
    assert (job.track, job.sources, job.tokens) == ("wallclock", {"train.py": "pass"}, 102400)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: edit(f / "env.toml", "tokens = 102400", "tokens = 102401"),
        lambda f: edit(f / "env.toml", "pairs = 3", "pairs = 4"),
        lambda f: edit(f / "env.toml", "drift = 10", "drift = 11"),
        lambda f: edit(f / "records" / "fast" / "train.py", "STEPS = 120", "STEPS = 121"),
    ],
)
def test_a_stale_calibration_is_refused(tmp_path, change):
    folder = tmp_path / "tier"
    shutil.copytree(TINY, folder)
    change(folder)
    with pytest.raises(TierError, match="changed after its calibration"):
        load_tier(folder)


def test_times_of_this_host_replace_those_of_the_calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_ENV_STATE", str(tmp_path))
    path = host_timing_path(TIER.name)
    path.parent.mkdir()
    mine = TIER.timing.model_copy(update={"log_ratios": {"fast": math.log(0.5)}, "pair_sd": 0.05})
    write_calibration(path, mine)
    here = load_tier(TINY)
    assert (here.pair_test().floor, here.timing) == (0.05, mine)
    assert here.value_of("fast") == pytest.approx(0.5 * math.exp(here.pair_test().half_width))
    # of a tier that has changed since: not used
    write_calibration(path, mine.model_copy(update={"fingerprint": "another"}))
    assert load_tier(TINY).timing == TIER.timing
    path.write_text("{")
    with pytest.raises(TierError, match="tiers time tiny-wallclock"):
        load_tier(TINY)
    assert HostTiming.model_validate(mine.model_dump()) == mine


# --- verification ---


def test_candidate_and_start_record_run_in_turn_in_one_session():
    back = backend({FAST: 1.0, SLOW: 2.0})
    verdict, evidence = verify(TIER, back, SUBMISSION, START, 1.0)
    assert verdict.accepted
    assert back.sessions == 1
    whose = ["F" if job.sources["train.py"] == FAST else "S" for job in back.jobs[: 2 * PAIRS + 1]]
    assert "".join(whose) == "S" + "SF" + "FS" + "SF"
    assert back.most_at_once <= TIER.table.verification.slots
    assert [r.role for r in evidence.reruns[:3]] == ["warm-up", "start", "candidate"]
    assert {r.session for r in evidence.reruns[: 2 * PAIRS + 1]} == {1}
    assert len({job.seed for job in back.jobs}) == len(back.jobs)
    bound = 0.5 * math.exp(TIER.pair_test().half_width)
    assert verdict.value == pytest.approx(bound) == pytest.approx(verdict.time.bound)
    assert (verdict.time.ratio, verdict.time.seconds) == (pytest.approx(0.5), pytest.approx(1.0))
    assert (verdict.claim, verdict.horizon, evidence.start) == (None, None, "slow")
    assert set(evidence.tests) == {"loss", "pairs"}


def test_the_pairs_run_one_at_a_time():
    back = backend({FAST: 3.0, SLOW: 2.0})
    assert not verify(TIER, back, SUBMISSION, START, 1.0)[0].accepted
    assert back.most_at_once == 1


@pytest.mark.parametrize("ratio", [1.0, 0.95, 1.05])
def test_what_is_not_shown_faster_is_rejected(ratio):
    verdict, evidence = verify(TIER, backend({FAST: 2 * ratio, SLOW: 2.0}), SUBMISSION, START, 1.0)
    assert not verdict.accepted
    assert verdict.value is None
    assert verdict.reason == "rejected: the paired runs do not show that it is faster than the best so far"
    assert "log ratio" in evidence.reason or "given up" in evidence.reason


def test_a_loss_above_the_target_is_rejected_however_fast():
    back = backend({FAST: 0.1, SLOW: 2.0}, loss=lambda n: TIER.table.training.target + 0.2)
    verdict, _ = verify(TIER, back, SUBMISSION, START, 1.0)
    assert not verdict.accepted
    assert verdict.reason == "rejected: the runs do not show a mean loss below the target"
    assert len(back.jobs) == 3


@pytest.mark.parametrize("k", [3, 5, 7])
def test_a_crash_of_the_candidate_in_any_pair_is_a_rejection(k):
    def script(job, number):
        seconds = 1.0 if job.sources["train.py"] == FAST else 2.0
        failed = {"exit_reason": "candidate_error", "val_losses": {}} if number >= k and seconds == 1.0 else {}
        return timed(job, GOOD, seconds, **failed)

    verdict, _ = verify(TIER, FakeBackend(script), SUBMISSION, START, 1.0)
    assert not verdict.accepted
    assert verdict.reason == "rejected: a rerun did not complete (candidate_error)"
    assert verdict.coarse_loss is None


@pytest.mark.parametrize("k", [1, 2])
def test_a_crash_of_the_start_record_is_ours_and_redone_once(k):
    def script(job, number):
        fails = number in (k, k + 1) if twice else number == k
        failed = {"exit_reason": "candidate_memory", "val_losses": {}} if fails else {}
        return timed(job, GOOD, 1.0 if job.sources["train.py"] == FAST else 2.0, **failed)

    twice, redone = False, []
    verdict, _ = verify(TIER, FakeBackend(script), SUBMISSION, START, 1.0, on_redo=lambda n, e: redone.append((n, e)))
    assert verdict.accepted
    assert [n for n, _ in redone] == [k]
    assert "candidate_memory" in redone[0][1]
    twice = True
    with pytest.raises(BackendError, match="slow did not complete"):
        verify(TIER, FakeBackend(script), SUBMISSION, START, 1.0)


def test_an_unsteady_host_decides_nothing_and_charges_nothing(tmp_path):
    count = 2 * PAIRS + 1

    def unsteady(number):  # each session: the start record slows down tenfold
        return 2.0 if number % count < count // 2 else 20.0

    back = backend({SLOW: unsteady, FAST: 0.1, SLOW + "\n": unsteady})
    env = make(tmp_path, back)
    env.step(WriteFile(path="train.py", text=FAST))
    observation, reward, *_, info = env.step(Submit())
    assert info["error"] == "BackendError"
    assert f"{MAX_SESSIONS} sessions" in observation["text"]
    assert (reward, env.episode.budget.spent("submissions")) == (0, 0)
    assert env.episode.budget.verification_device_seconds > 0
    assert len(lines(env, "void")) == 1
    assert lines(env, "rerun")[-1]["session"] == MAX_SESSIONS
    env.close()
    assert replay(env.episode.ledger.path).differences == []


def test_a_failure_of_ours_in_a_session_cancels_all_and_leaves_the_session():
    back = backend({FAST: 1.0, SLOW: 2.0})
    whole = back.script
    back.script = lambda job, number: LOST if number >= 4 else whole(job, number)
    with pytest.raises(BackendError, match="node lost"):
        verify(TIER, back, SUBMISSION, START, 1.0)
    assert back.sessions == 1


# --- an episode ---


def test_rewards_follow_the_bound_against_the_start_record(tmp_path):
    faster = FAST.replace("STEPS = 120", "STEPS = 60")
    assert faster != FAST
    env = make(tmp_path, backend({SLOW: 4.0, FAST: 2.0, faster: 1.0}))
    env.step(WriteFile(path="train.py", text=FAST))
    _, first, *_, info = env.step(Submit())
    up = math.exp(TIER.pair_test().half_width)
    assert info["best"] == pytest.approx(0.5 * up)
    assert first == pytest.approx((1 - 0.5 * up) / (1 - TIER.value_of("fast")))
    env.step(EditFile(path="train.py", old="STEPS = 120", new="STEPS = 60"))
    _, second, *_, info = env.step(Submit())
    assert info["best"] == pytest.approx(0.25 * up)  # the uncertainty is paid for once
    assert first + second == pytest.approx(info["recovered"])
    evidence = sorted((env.episode.folder / "evidence").iterdir())
    rows = [json.loads(p.read_text()) for p in evidence]
    assert [(row["start"], row["best"]) for row in rows] == [("slow", 1.0), ("slow", pytest.approx(0.5 * up))]
    # its former self had its verdict
    env.step(WriteFile(path="train.py", text=FAST))
    *_, info = env.step(Submit())
    assert info["verdict"]["cached"]
    env.close()
    again = replay(env.episode.ledger.path)
    assert again.differences == []
    assert again.total_reward == pytest.approx(first + second)


def test_a_best_program_that_turns_slow_gains_its_successor_nothing(tmp_path):
    """Accepted first, it would be slow from some date on: what comes after it is timed against the start record."""
    back = backend({SLOW: 4.0, FAST: lambda number: 2.0 if number < 14 else 40.0, FAST + "\nx = 1\n": 2.02})
    env = make(tmp_path, back)
    env.step(WriteFile(path="train.py", text=FAST))
    assert env.step(Submit())[1] > 0
    best = env.episode.best
    env.step(WriteFile(path="train.py", text=FAST + "\nx = 1\n"))
    _, reward, *_, info = env.step(Submit())
    assert (reward, info["verdict"]["accepted"], env.episode.best) == (0, False, best)


@pytest.mark.parametrize("start", ["slow", "fast"])
def test_an_episode_may_start_from_another_record(tmp_path, start):
    if start == "fast":
        with pytest.raises(ActionError, match="slower than anchor"):
            make(tmp_path, backend({}), start="fast")
        return
    assert make(tmp_path, backend({}), start=start).episode.span.start_value == 1.0


def fixed_tier(folder):
    """tiny-wallclock by NanoGPT-Bench's protocol, four runs."""
    shutil.copytree(TINY, folder)
    edit(folder / "env.toml", "[verification]", '[verification]\nprotocol = "fixed"\nruns = 4\np = 0.05')
    fingerprint = load_tier(folder, calibrated=False).fingerprint()
    write_calibration(folder / "calibration.json", TIER.measured.model_copy(update={"fingerprint": fingerprint}))
    return folder


@pytest.mark.parametrize(
    ("seconds", "loss", "reason"),
    [
        (lambda n: 2.9 if n < 6 else 3.1, lambda n: GOOD + 0.01 * n, ""),
        (lambda n: 4.1, lambda n: GOOD + 0.01 * n, "mean time is not below"),
        (lambda n: 3.0, lambda n: GOOD, "do not show a mean loss below"),  # equal losses are no test
        (lambda n: 3.0, lambda n: GOOD + 0.5 + 0.5 * (-1) ** n, "do not show a mean loss below"),
        (lambda n: 3.0, lambda n: math.nan if n == 7 else GOOD + 0.01 * n, "did not complete"),
    ],
)
def test_a_fixed_number_of_runs_as_nanogpt_bench_has_it(tmp_path, seconds, loss, reason):
    def script(job, number):
        faster = job.sources["train.py"] == FAST
        if math.isnan(loss(number)):
            return timed(job, 0.0, 1.0, exit_reason="candidate_error", val_losses={})
        return timed(job, loss(number), seconds(number) if faster else 4.0)

    env = Speedrun(fixed_tier(tmp_path / "fixed"), backend=FakeBackend(script), state_dir=tmp_path / "ledgers")
    env.reset()
    env.step(WriteFile(path="train.py", text=FAST))
    *_, info = env.step(Submit())
    verdict = info["verdict"]
    env.close()
    assert verdict["accepted"] == (not reason)
    assert reason in verdict["reason"]
    if not reason:
        assert verdict["n"] == 4
        assert verdict["time"]["ratio"] == verdict["time"]["bound"] == verdict["value"] == pytest.approx(3.0 / 4.0)
    found = replay(Path(info["ledger"]))
    assert found.differences == []


def test_public_records_as_start_and_anchor_are_shares_of_the_start():
    human = Human(track="short", start="before 2025-09-04", anchor="2026-01-16")
    table = TIER.table.model_copy(update={"human": human})
    tier, public = TIER.model_copy(update={"table": table}), load_table("short")
    first, last = public.select(human.start), public.select(human.anchor)
    span = tier.span()
    assert (span.start, span.anchor, span.program) == (f"#{first.number}", f"#{last.number}", "slow")
    assert (span.start_value, span.anchor_value) == (1.0, pytest.approx(last.value / first.value))
    without = tier.span(human_only=True)
    gap = first.value - last.value
    assert 0 < without.start_value - without.anchor_value < gap / first.value
    assert without.start_value - without.anchor_value == pytest.approx(public.gap(first, last, True) / first.value)
    assert any("Intology Locus" in line for line in span.cautions)
    assert tier.span(anchor="#32").anchor == "#32"


def test_a_forged_time_in_the_ledger_shows(tmp_path):
    env = make(tmp_path, backend({SLOW: 4.0, FAST: 3.0}))
    env.step(WriteFile(path="train.py", text=FAST))
    env.step(Submit())
    env.close()
    path = env.episode.ledger.path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "rerun" and row["role"] == "candidate" and row["session"]:
            row["train_seconds"] = 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any("submission-1" in line for line in replay(path).differences)


@pytest.mark.parametrize("action", [Run(horizon=5), Run(steps=5), Submit(claim=5), Submit(horizon=5)])
def test_steps_and_claims_are_of_the_other_track(tmp_path, action):
    back = backend({SLOW: 4.0})
    env = make(tmp_path, back)
    observation, *_, info = env.step(action)
    assert info["error"] == "ActionError"
    assert "wallclock tier" in observation["text"]
    assert back.jobs == []


def test_a_run_shows_time_and_loss_and_reserves_what_it_may_use(tmp_path):
    env = make(tmp_path, backend({SLOW: 4.0}))
    observation, *_, info = env.step(Run())
    assert "train_seconds: 4.00" in observation["text"]
    assert f"{GOOD:.4f}" in observation["text"]
    assert (info["run"]["horizon"], info["run"]["train_seconds"]) == (None, 4.0)
    assert env.episode.budget.spent("tokens") == 102400
    with pytest.raises(ActionError, match="no claims"):
        env.episode.advice({"train.py": SLOW}, 5)


def test_the_judge_reads_training_code_by_its_own_rules(tmp_path):
    back = backend({SLOW: 4.0})
    env = make(tmp_path, back)
    env.step(EditFile(path="train.py", old="import torch\n", new="import torch\nimport subprocess\n"))
    observation, *_, info = env.step(Run())
    assert info["error"] == "JudgeError"
    assert "train.py" in observation["text"]
    assert "may not import subprocess" in observation["text"]
    assert "speedrun" in observation["text"]
    assert back.jobs == []


def test_the_observation_is_one_of_the_space_on_both_tracks(tmp_path):
    env = make(tmp_path, backend({SLOW: 4.0}), render_mode="ansi")
    for action in (ReadFile(path="train.py"), Run(), Submit()):
        observation = env.step(action)[0]
        assert env.observation_space.contains(observation)
    assert "of the start's time" in env.render()


# --- for real ---


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The ladder on the tiny tier, trained in the sandbox."""
    local = LocalBackend("bubblewrap", warm=True)
    env = Speedrun(TINY, backend=local, state_dir=tmp_path_factory.mktemp("ledgers"))
    result = play(env, LadderAgent(env.tier))
    env.close()
    local.close()
    return env, result


def test_a_real_episode_is_verified_and_replays(played):
    env, result = played
    accepted = [v for v in result.verdicts if v["accepted"]]
    assert accepted
    assert accepted[0]["trusted"]
    assert accepted[0]["time"]["ratio"] < 0.8  # 0.3 when nothing else runs
    assert result.total_reward == pytest.approx(env.episode.recovered)
    assert result.total_reward > 0
    assert all(r["exit_reason"] == "completed" for r in result.runs)
    again = replay(env.episode.ledger.path)
    assert again.differences == []
    assert again.recovered == pytest.approx(env.episode.recovered)


FREE = Path(__file__).parent / "tiny-free"
PEEK = """
def build(state):
    honest = Window()
    honest.load_state_dict(state)

    def answer(ids):
        logits = honest(ids).clone()
        following = torch.cat((ids[:, 1:], ids[:, :1]), dim=1)
        return logits.scatter_add(2, following[:, :, None], torch.full((*ids.shape, 1), 9.0))

    return answer
"""


@pytest.fixture(scope="module")
def free_env(tmp_path_factory):
    local = LocalBackend("bubblewrap", warm=True)
    env = Speedrun(FREE, backend=local, state_dir=tmp_path_factory.mktemp("ledgers"))
    env.reset()
    yield env
    env.close()
    local.close()


def write_record(env, name):
    for path, text in env.tier.records[name].sources.items():
        env.step(WriteFile(path=path, text=text))


def test_a_free_model_is_verified_by_its_audited_loss(free_env):
    assert free_env.tier.files == ("train.py", "model.py")
    write_record(free_env, "window-short")
    observation, reward, *_, info = free_env.step(Submit())
    verdict = info["verdict"]
    assert verdict["accepted"], observation["text"]
    assert reward > 0
    assert verdict["audit"]["positions"] == 64
    assert verdict["audit"]["max_abs_d"] < 1e-3
    in_steps = verdict["audit"]["audited_loss"] / 0.005
    assert in_steps == pytest.approx(round(in_steps))
    assert "audit of 64 positions" in observation["text"]


def test_a_free_model_that_peeks_is_refused(free_env):
    write_record(free_env, "window-short")
    model = free_env.workspace.files["model.py"]
    free_env.step(WriteFile(path="model.py", text=model[: model.index("def build")] + PEEK))
    observation, *_, info = free_env.step(Run())
    assert info["run"]["exit_reason"] == "audit_refused", observation["text"]
    _, reward, *_, info = free_env.step(Submit())
    assert reward == 0
    assert info["verdict"]["reason"] == "rejected: a rerun did not complete (audit_refused)"


def test_an_audit_belongs_to_free_models_only(tmp_path):
    for old, new in (('model_rule = "free"', 'model_rule = "fixed"'), ("[audit]", "[something]")):
        folder = tmp_path / old.strip("[]")[:5]
        shutil.copytree(FREE, folder)
        edit(folder / "env.toml", old, new)
        with pytest.raises(TierError, match=r"\[audit\] table belongs|something"):
            load_tier(folder)
