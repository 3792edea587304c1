"""Gymnasium's contract: spaces, info, rendering, options. Nothing here trains; see test_real_episodes.py."""

import itertools
import json
import math
import re
import shutil
import statistics
import time

import gymnasium
import numpy as np
import pytest
from conftest import TINY
from episodes import ACCEPTED_N, CLAIM, INFO, SLOW, START, TIER, NoTraining, do, share, spent
from fakes import FakeBackend, hidden_losses
from gymnasium.utils.env_checker import check_env

from nanogpt_env import (
    ActionError,
    EditFile,
    Note,
    Poll,
    ReadFile,
    Revert,
    Run,
    Speedrun,
    Stop,
    Submit,
    TierError,
    WriteFile,
)
from nanogpt_env.actions import to_flat
from nanogpt_env.budget import METERS, RUN_METERS
from nanogpt_env.human import load_table
from nanogpt_env.ledger import read_ledger
from nanogpt_env.spaces import SCORES
from nanogpt_env.tiers import builtin_tiers, load_tier
from nanogpt_env.types import RunResult

# --- Gymnasium's contract ---


def test_every_built_in_tier_has_an_id():
    ids = {name for name in gymnasium.registry if name.startswith("NanoGPT/")}
    titles = ("NanoSteps", "MicroSteps", "NanoWallclock", "MicroWallclock")
    titles += ("SmallSteps", "SmallWallclock", "MediumWallclock", "NanogptBench")
    tiers = {f"NanoGPT/{name}-v0" for name in titles}
    assert ids == {"NanoGPT/Speedrun-v0"} | tiers
    assert all(gymnasium.spec(name).nondeterministic for name in ids)
    assert len(ids) == 1 + len(builtin_tiers())


def test_check_env_on_a_tier_given_by_path():
    env = gymnasium.make("nanogpt_env:NanoGPT/Speedrun-v0", tier=str(TINY), backend=NoTraining())
    check_env(env.unwrapped)  # pytest turns every warning into an error
    env.close()


@pytest.mark.parametrize("name", builtin_tiers())
def test_check_env_on_the_built_in_tiers(name):
    title = "".join(part.capitalize() for part in name.split("-"))
    env = gymnasium.make(f"NanoGPT/{title}-v0", backend=NoTraining())
    assert env.unwrapped.tier.name == name
    check_env(env.unwrapped)
    env.close()


def test_sampled_actions_never_start_a_run(make):
    env = make(NoTraining(), budget={"episode_steps": 1e6})
    env.action_space.seed(0)
    seen = set()
    for _ in range(1500):
        action = env.action_space.sample()
        seen.add(int(action["type"]))
        _, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated) == (0, False, False)
        assert info["error"] == "ActionError"
    assert len(seen) == 11
    assert all(spent(env, meter) == 0 for meter in RUN_METERS)


def test_make_wraps_models_dicts_and_text_alike(tmp_path):
    backend = FakeBackend()
    env = gymnasium.make("NanoGPT/Speedrun-v0", tier=TINY, backend=backend, state_dir=tmp_path)
    env.reset(seed=3)
    action = EditFile(path="optimizer.py", old="0.004", new="0.005")
    for form in (action, to_flat(action), action.model_dump(), action.model_dump_json()):
        env.step(Revert())
        _, _, _, _, info = env.step(form)
        assert "error" not in info
        assert env.unwrapped.workspace.files["optimizer.py"] == SLOW.replace("0.004", "0.005")
    env.close()


def test_a_vector_of_environments_edits_apart(tmp_path):
    envs = gymnasium.make_vec(
        "NanoGPT/Speedrun-v0", num_envs=2, vectorization_mode="sync", tier=str(TINY), state_dir=str(tmp_path)
    )
    observation, info = envs.reset(seed=1)
    assert observation["scores"].shape == (2, len(SCORES))
    assert observation["budget"].shape == (2, len(METERS))
    assert len(set(info["episode_id"])) == 2
    models = [WriteFile(path="optimizer.py", text=f"x = {i}\n") for i in range(2)]
    flat = [to_flat(m) for m in models]
    batch = {key: tuple(f[key] for f in flat) for key in flat[0]}
    observation, rewards, terminated, truncated, _ = envs.step(batch)
    assert all("wrote optimizer.py" in text for text in observation["text"])
    assert not rewards.any() and not terminated.any() and not truncated.any()
    assert [env.unwrapped.workspace.files["optimizer.py"] for env in envs.envs] == ["x = 0\n", "x = 1\n"]
    envs.close()


def test_an_unknown_render_mode_is_refused():
    with pytest.raises(ValueError, match="render_mode"):
        Speedrun(TINY, render_mode="rgb_array")


def test_an_unknown_sandbox_is_refused():
    with pytest.raises(ValueError, match="auto, docker, bubblewrap, landlock, plain"):
        Speedrun(TINY, sandbox="chroot")


def test_the_first_observation_is_the_task(make):
    env = make()
    observation, info = env.reset(seed=5)
    assert TIER.task in observation["text"]
    assert f"start slow {START:g} steps" in observation["text"]
    assert observation["scores"].tolist() == [0, 1, 0, 0, 0, 0]
    assert observation["budget"].tolist() == pytest.approx([1] * len(METERS), abs=1e-3)
    assert observation["scores"].dtype == observation["budget"].dtype == np.float32
    assert set(info) == INFO


def test_scores_follow_the_runs_and_verdicts(make):
    env = make()
    env.step(Run(horizon=100))
    observation, *_ = env.step(CLAIM)
    scores = dict(zip(SCORES, observation["scores"].tolist(), strict=True))
    assert scores == pytest.approx(
        {
            "recovered": share(60),
            "best_share": 60 / START,
            "val_loss": 4.5,
            "train_loss": 4.51,
            "last_accepted": 1,
            "submissions": 1,
        }
    )
    left = dict(zip(METERS, observation["budget"].tolist(), strict=True))
    assert left["runs"] == pytest.approx(49 / 50)
    assert left["submissions"] == pytest.approx(4 / 5)


def test_info_has_stable_keys_and_fresh_objects(make):
    env = make(FakeBackend(hidden_losses([4.5] * (ACCEPTED_N + 1) + [5.2] * 2)))
    expected = [
        (ReadFile(), set()),
        ("garbage", {"error"}),
        (Run(horizon=100), {"run"}),
        (Run(horizon=10**8), {"error"}),
        (CLAIM, {"verdict"}),
        (CLAIM, {"verdict"}),
        (Submit(claim=50, horizon=60), {"verdict"}),
        (Poll(handle="run-1"), {"run"}),
        (Poll(handle="run-9"), {"error"}),
        (Stop(), set()),
    ]
    infos = []
    for action, more in expected:
        infos.append(env.step(action)[4])
        assert set(infos[-1]) == INFO | more, action
    assert set(infos[2]["run"]) == {"handle", "done", "horizon", "seed", "mfu", *RunResult.model_fields}
    for a, b in itertools.pairwise(infos):
        assert a is not b
        assert a["budget"] is not b["budget"]
        assert a["running"] is not b["running"]
        assert a["budget"]["runs"] is not b["budget"]["runs"]
    assert infos[4]["verdict"] is not infos[5]["verdict"]
    json.dumps(infos)


def test_what_an_agent_does_to_an_observation_changes_nothing(make):
    env = make()
    observation, _, _, _, info = env.step(ReadFile(path="task.md"))
    observation["scores"][:] = 7
    info["budget"]["runs"]["spent"] = -100
    info["running"].append("run-7")
    observation, _, _, _, info = env.step(ReadFile(path="task.md"))
    assert observation["scores"].tolist() == [0, 1, 0, 0, 0, 0]
    assert info["budget"]["runs"]["spent"] == 0
    assert info["running"] == []


def test_history_is_what_was_done_and_seen(make):
    env = make()
    seen = [env.step(a)[0]["text"] for a in (ReadFile(path="task.md"), "garbage", Note(text="idea"))]
    assert env.history == list(zip(["read_file", "malformed", "note"], seen, strict=True))
    env.reset()
    assert env.history == []


def test_render_ansi_is_the_state(make):
    env = make(render_mode="ansi")
    do(env, Run(horizon=100), CLAIM)
    text = env.render()
    assert "frontier: 60 steps (submission-1)" in text
    assert f"recovered {share(60):.4f}" in text
    assert "runs: 1 of 50 spent" in text
    verdict = f"claim 60: accepted: the reruns' mean loss is below the target (n = {ACCEPTED_N})"
    assert f"last verdict: submission-1 {verdict}" in text


def test_render_human_prints_every_step(make, capsys):
    env = make(render_mode="human")
    assert TIER.task in capsys.readouterr().out
    env.step(Note(text="x"))
    out = capsys.readouterr().out
    assert "noted" in out and "frontier" in out
    assert env.render() is None
    assert capsys.readouterr().out == ""


def test_without_a_render_mode_nothing_is_printed(make, capsys):
    env = make()
    do(env, Run(horizon=100), CLAIM, Stop())
    assert env.render() is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "form",
    [
        lambda i: ReadFile(path="optimizer.py"),
        lambda i: EditFile(path="optimizer.py", old=f"0.0{4 + i}", new=f"0.0{5 + i}"),
    ],
    ids=["read", "edit"],
)
def test_a_step_that_does_not_train_is_fast(make, form):
    env = make(budget={"episode_steps": 1e4})
    env.step(WriteFile(path="optimizer.py", text=SLOW.replace("0.004", "0.04")))
    seconds = []
    for i in range(100):
        action = form(i)
        began = time.perf_counter()
        result = env.step(action)
        seconds.append(time.perf_counter() - began)
        assert "error" not in result[4]
    assert statistics.median(seconds) < 0.005  # meant: under a millisecond


# --- options ---


def test_reset_takes_start_anchor_and_budget(make, tmp_path):
    folder = tmp_path / "three"
    shutil.copytree(TINY, folder)
    (folder / "calibration.json").unlink()
    shutil.copytree(folder / "records" / "slow", folder / "records" / "middle")
    tier = load_tier(folder, calibrated=False)
    c = TIER.measured
    middle = c.records["slow"].model_copy(update={"value": 75.0})
    c = c.model_copy(update={"fingerprint": tier.fingerprint(), "records": {**c.records, "middle": middle}})
    (folder / "calibration.json").write_text(c.model_dump_json())
    env = make(tier=folder, start="middle", budget={"runs": 3})
    assert env.episode.span.start_value == 75
    _, info = env.reset(options={"anchor": "middle", "start": "slow", "budget": {"submissions": 4, "runs": 2}})
    assert (env.episode.span.start_value, env.episode.span.anchor_value) == (START, 75)
    assert (info["budget"]["submissions"]["limit"], info["budget"]["runs"]["limit"]) == (4, 2)
    _, info = env.reset()
    assert (env.episode.span.start_value, info["budget"]["runs"]["limit"]) == (75, 3)


@pytest.fixture
def public_tier(tmp_path):
    """tiny-steps, but measured between records of the public optimization track."""
    folder = tmp_path / "public"
    shutil.copytree(TINY, folder)
    table = (folder / "env.toml").read_text()
    human = '\n[human]\ntrack = "optimization"\nstart = "1"\nanchor = "before 2026-05-20"\n'
    (folder / "env.toml").write_text(re.sub(r'anchor = "\w+"\n?', "", table) + human)
    c = TIER.measured.model_copy(update={"fingerprint": load_tier(folder, calibrated=False).fingerprint()})
    (folder / "calibration.json").write_text(c.model_dump_json())
    return folder


def test_start_and_anchor_from_a_public_table(make, public_tier):
    env = make(tier=public_tier)
    table = load_table("optimization")
    assert env.episode.span.start == "#1"
    assert env.episode.span.start_value == table.select("1").value
    assert env.episode.span.anchor_value == table.select("before 2026-05-20").value
    assert env.workspace.files == dict(TIER.records["slow"].sources)
    env.reset(options={"anchor": "latest", "start": "before 2026-05-20"})
    latest, early = table.select("latest"), table.select("before 2026-05-20")
    assert (env.episode.span.start, env.episode.span.anchor) == (f"#{early.number}", f"#{latest.number}")
    env.reset(options={"anchor": "latest", "human_only": True})
    head = read_ledger(env.episode.ledger.path)[0][0]
    assert (head["start"]["record"], head["human_only"]) == ("#1", True)
    assert env.episode.span.cautions == ("record 1 fails the table's own rule",)
    with pytest.raises(TierError, match="no record 'before 2000-01-01'"):
        env.reset(options={"anchor": "before 2000-01-01"})
    with pytest.raises(TierError, match="no better"):
        env.reset(options={"anchor": "1", "start": "latest"})


def test_gpu_hours_stand_for_device_seconds(make):
    env = make()
    _, info = env.reset(options={"budget": {"gpu_hours": 0.5}})
    assert info["budget"]["device_seconds"]["limit"] == 1800


def test_a_tier_says_once_what_it_is_measured_on(public_tier):
    path = public_tier / "env.toml"
    table = path.read_text()
    for wrong, text in (
        (table.replace("[reward]", '[reward]\nanchor = "fast"'), "not both"),
        (table.replace('"optimization"', '"short"'), "not measured in what a steps tier is"),
        (table.partition("[human]")[0], "a \\[human\\] table has it"),
    ):
        path.write_text(wrong)
        with pytest.raises(TierError, match=text):
            load_tier(public_tier)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"difficulty": 3}, ActionError, "unknown options difficulty; there are start, anchor, human_only, budget"),
        ({"budget": {"gpu_days": 3}}, ActionError, "unknown meters gpu_days"),
        ({"budget": {"gpu_hours": 3, "device_seconds": 4}}, ActionError, "one meter"),
        ({"budget": {"gpu_hours": "3"}}, ActionError, "positive and finite"),
        ({"budget": {"gpu_hours": -3}}, ActionError, "positive and finite"),
        ({"budget": {"runs": 0}}, ActionError, "positive and finite"),
        ({"budget": {"runs": math.nan}}, ActionError, "positive and finite"),
        ({"budget": {"runs": math.inf}}, ActionError, "positive and finite"),
        ({"budget": {"runs": "many"}}, ActionError, "positive and finite"),
        ({"budget": {"submissions": 6}}, ActionError, "lowered but not raised"),
        ({"start": "gpt-5"}, TierError, "it has slow, fast"),
        ({"human_only": True}, ActionError, "measured on its own records"),
        ({"start": "fast", "anchor": "slow"}, ActionError, "must be slower"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, options, error, text):
    env = make()
    with pytest.raises(error, match=text.replace("(", r"\(")):
        env.reset(options=options)


def test_a_tier_that_is_not_there_or_not_calibrated_is_refused(tmp_path):
    with pytest.raises(TierError, match="neither a folder"):
        Speedrun("pico-steps")
    shutil.copytree(TINY, tmp_path / "tier")
    (tmp_path / "tier" / "calibration.json").unlink()
    with pytest.raises(TierError, match="tiers calibrate"):
        Speedrun(tmp_path / "tier")


def test_the_seed_of_reset_decides_no_rerun(make, tmp_path):
    runs, reruns = [], []
    for _ in range(2):
        env = make(backend := FakeBackend())
        env.reset(seed=7)
        do(env, Run(horizon=100), CLAIM)
        runs += [job.seed for job in backend.jobs if job.final_shards == ("val_public",)]
        reruns += [job.seed for job in backend.jobs if job.final_shards == ("val_hidden",)]
    assert len(reruns) == len(set(reruns)) >= 2 * ACCEPTED_N
    assert len(runs) == 2 and runs[0] == runs[1]  # the same run on this host, which is trained once
    assert not set(runs) & set(reruns)
