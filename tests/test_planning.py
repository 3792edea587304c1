"""Tiers for a FLOP budget: what is proposed, what is written, what is said to be extrapolated."""

import pytest
from test_cli import call, call_json

from nanogpt_env import TierError, planning
from nanogpt_env.hardware import load_hardware, mfu, of_run, profiles
from nanogpt_env.tables import Model
from nanogpt_env.tiers import load_tier
from nanogpt_env.tracks import flops_per_token, matmul_weights
from nanogpt_env.types import RunResult, SandboxInfo

CPU, H100 = load_hardware("cpu"), load_hardware("H100")


def test_flops_of_the_public_baseline():
    small = Model(layers=12, width=768, heads=6, vocab_size=50304, seq_len=1024)
    assert matmul_weights(small) == planning.SMALL_WEIGHTS == 123_568_128
    assert flops_per_token(small) == pytest.approx(8.55e8, rel=0.001)
    assert 3500 * 524_288 * flops_per_token(small) == pytest.approx(1.57e18, rel=0.003)


def test_a_budget_of_the_public_track_proposes_the_public_model():
    plan = planning.plan(1.57e18, H100, 8)
    assert (plan.model.layers, plan.model.width, plan.model.vocab_size) == (12, 768, 50304)
    assert plan.tokens == pytest.approx(1.835e9, rel=0.02)
    assert plan.batch_size * plan.model.seq_len == 524_288
    assert plan.target == pytest.approx(3.28, abs=0.02)
    assert plan.seconds == pytest.approx(plan.flops / (8 * 0.4 * 989.4e12))
    assert [line.partition(":")[0] for line in plan.extrapolated] == ["the time"]


@pytest.mark.parametrize(("flops", "name"), [(3.2e11, "nano-steps"), (2.2e12, "micro-steps")])
def test_a_budget_of_a_cpu_tier_proposes_about_that_tier(flops, name):
    plan, tier = planning.plan(flops, CPU), load_tier(name)
    assert plan.model == tier.table.model
    assert plan.target == pytest.approx(tier.table.training.target, abs=0.06)
    assert plan.extrapolated == ()


@pytest.mark.parametrize(("tokens", "reached"), [(65.5e6, 4.664), (131e6, 4.124), (262e6, 3.835)])
def test_the_law_at_fewer_tokens_is_near_what_public_runs_pass_through(tokens, reached):
    """Losses of the optimization track's runs on the way, before any cooldown: a run of that length ends a bit lower,
    but needs smaller batches for it."""
    assert planning.published_law().loss(planning.SMALL_WEIGHTS, tokens) == pytest.approx(reached, abs=0.12)


@pytest.mark.parametrize(
    ("flops", "hardware", "gpus", "options"),
    [(3e11, CPU, 1, {}), (2e13, CPU, 2, {}), (1e16, H100, 1, {}), (1e20, H100, 8, {}), (1e15, CPU, 4, {})],
)
def test_a_planned_folder_loads_and_says_what_it_was_planned_for(flops, hardware, gpus, options, tmp_path):
    plan = planning.plan(flops, hardware, gpus, **options)
    tier = planning.write_tier(plan, tmp_path / "mine")
    t = tier.table
    assert (t.model, t.training.batch_size, t.training.target) == (plan.model, plan.batch_size, plan.target)
    assert tier.record(t.reward.start).horizon == plan.steps
    assert all(record.horizon <= t.training.max_horizon for record in tier.records.values())
    assert f"{plan.target:.2f} nats" in tier.task
    assert f"({plan.model.layers} layers, width {plan.model.width}," in tier.task
    assert t.budget.flops == pytest.approx(planning.RUNS * plan.flops)
    assert plan.memory_bytes < hardware.memory_bytes
    assert plan.flops == pytest.approx(flops, rel=0.02)
    assert (t.training.numbers, t.training.shards) == (("fp32", 1) if hardware is CPU else ("bf16", 8))
    assert tier.job({"optimizer.py": ""}, tier.plan(10, 10), "1", (t.data.hidden,)).train_shards
    with pytest.raises(TierError, match="not empty"):
        planning.write_tier(plan, tmp_path / "mine")


@pytest.mark.parametrize("flops", [1e5, 1e14, 1e23, -1.0, float("nan"), float("inf")])
def test_budgets_that_cannot_be_spent(flops):
    with pytest.raises(TierError, match=r"cannot be spent well|positive FLOPs"):
        planning.plan(flops, H100)


def test_what_does_not_fit_or_does_not_exist():
    with pytest.raises(TierError, match="GB are needed"):
        planning.plan(1e20, H100.model_copy(update={"memory_bytes": 8e9}))
    with pytest.raises(TierError, match="shakespeare or fineweb10B"):
        planning.plan(1e16, H100, corpus="imagenet")
    with pytest.raises(TierError, match="cpu, h100, h200"):
        load_hardware("tpu")


def test_the_command(tmp_path):
    told = call("tiers", "plan", "1e16", "--hardware", "h100", cwd=tmp_path)
    assert told.returncode == 0
    assert "extrapolated: the target" in told.stdout
    assert "data fetch --tier steps-1e16" in told.stdout
    assert load_tier(tmp_path / "steps-1e16", calibrated=False).name == "steps-1e16"
    dry = call_json("tiers", "plan", "3e11", "--dry-run", cwd=tmp_path)
    assert dry["folder"] is None
    assert dry["plan"]["model"]["width"] == 64
    assert not (tmp_path / "steps-3e11").exists()
    wrong = call("tiers", "plan", "1e16", "--hardware", "tpu", cwd=tmp_path)
    assert wrong.returncode
    assert "cpu, h100, h200" in wrong.stderr


# --- hardware ---


def test_profiles():
    for name in profiles():
        profile = load_hardware(name)
        assert profile.name == name
        assert profile.source
        assert all(peak > 1e9 for peak in profile.peak_flops.values())


def run_of(flops, seconds, **hardware):
    sandbox = SandboxInfo(name="fake", trusted=True)
    fields = {"exit_reason": "completed", "flops": flops, "train_seconds": seconds, "hardware": hardware}
    return RunResult(**fields, sandbox=sandbox)


def test_mfu():
    assert mfu(run_of(4.7e10, 1.0, cpu="AMD EPYC")) == pytest.approx(0.5)
    gpu = {"gpu": "NVIDIA H100 80GB HBM3", "numbers": "bf16", "devices": 8}
    assert mfu(run_of(989.4e12 * 8, 2.0, **gpu)) == pytest.approx(0.5)
    assert mfu(run_of(0, 1.0, cpu="AMD EPYC")) is None
    assert mfu(run_of(1e9, 1.0, cpu="AMD EPYC", numbers="bf16")) is None  # no peak is known
    assert of_run({"gpu": "Some other device"}) is None
    assert mfu(run_of(1e12, 1.0, gpu="Some other device")) is None


def test_a_profile_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    lines = ['name = "mine"', 'summary = "s"', "matches = []", "memory_bytes = 1e9", 'source = "me"']
    path.write_text("\n".join([*lines, "peak_flops = {fp32 = 0}"]))
    with pytest.raises(TierError, match=r"peak_flops\.fp32"):
        load_hardware(str(path))
    path.write_text(path.read_text().replace("fp32 = 0", "fp32 = 1e12"))
    assert load_hardware(str(path)).seconds(1e12, 0.5, 2) == 1.0
