"""The GPU tiers: what they are, and their programs and settings in small on the CPU. No GPU is used here."""

import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toys import toy

from nanogpt_env import Run, Speedrun, Submit
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.content import cache_dir
from nanogpt_env.errors import TierError
from nanogpt_env.human import load_table
from nanogpt_env.judging.static import judge_source
from nanogpt_env.published import calibrate
from nanogpt_env.tiers import builtin_tiers, load_tier
from nanogpt_env.tracks import flops_per_token

import data
import model

ROOT = Path(__file__).parents[1]
GPU_TIERS = ["medium-wallclock", "nanogpt-bench", "small-steps", "small-wallclock"]


@pytest.fixture(scope="module")
def cold():
    with contextlib.closing(LocalBackend("bubblewrap")) as backend:
        yield backend


# --- what they are ---


def test_gpu_tiers_are_those_that_ask_for_gpus():
    assert [name for name in builtin_tiers() if load_tier(name).table.gpus] == GPU_TIERS


@pytest.mark.parametrize(
    ("name", "start", "anchor", "values"),
    [
        ("small-steps", "#3", "#46", (3500, 2690)),
        ("small-wallclock", "#10", "#62", (1, 1.655 / 7.8)),
        ("medium-wallclock", "#2", "#18", (1, 17.35 / 29.3)),
        ("nanogpt-bench", "#29", "#62", (1, 1 - 63.2192 / 163.836)),
    ],
)
def test_what_rewards_are_measured_on(name, start, anchor, values):
    span = load_tier(name).span()
    assert (span.start, span.anchor) == (start, anchor)
    assert (span.start_value, span.anchor_value) == pytest.approx(values)


def test_a_new_anchor_by_date_at_reset(tmp_path):
    with contextlib.closing(Speedrun("small-steps", state_dir=tmp_path)) as env:
        env.reset(options={"start": "before 2026-05-01", "anchor": "2026-05-20"})
        assert (env.episode.span.start_value, env.episode.span.anchor_value) == (3250, 2900)
        env.reset(options={"anchor": "latest", "human_only": True})
        assert (env.episode.span.anchor_value, env.episode.span.human_only) == (2690, True)


def test_the_model_and_tokens_are_the_public_ones():
    steps, medium = load_tier("small-steps").table, load_tier("medium-wallclock").table
    assert steps.training.batch_size * steps.model.seq_len == 524_288
    assert sum(p.numel() for p in model.GPT(model.ModelConfig(**steps.model.model_dump())).parameters()) == 162_354_816
    assert 3500 * 524_288 * flops_per_token(steps.model) == pytest.approx(1.57e18, rel=0.003)
    assert medium.model.layers * 12 * medium.model.width**2 == 301_989_888
    for table in (steps, medium):
        assert table.data.hidden == table.data.public == "fineweb_val_000000[0:10485761]"
        assert (10_485_761 - 1) % table.model.seq_len == 0  # every token of the public track, and no other
        tokens = 1e8 * len(table.data.train_shards)
        assert tokens > (4000 * 524_288 if table is steps else medium.training.tokens)
    for name in GPU_TIERS[:2] + GPU_TIERS[3:]:
        training = load_tier(name).table.training
        assert training.tokens % training.max_batch_tokens == 0  # the start program uses them all


def test_published_noise_is_what_the_public_runs_show():
    rows = [r.from_logs for r in load_table("short").records if r.from_logs and r.from_logs.n > 2]
    assert len(rows) == 60
    losses = statistics.quantiles([r.sd_val_loss for r in rows], n=4, method="inclusive")[2]
    times = statistics.quantiles([r.sd_minutes / r.mean_minutes for r in rows], n=4, method="inclusive")[2]
    noise = load_tier("small-wallclock").table.published
    assert (noise.sigma, noise.pair_sd) == pytest.approx((losses, math.sqrt(2) * times), rel=0.25)
    assert noise.sigma >= losses and noise.pair_sd >= math.sqrt(2) * times


def test_published_noise_is_not_for_what_must_be_measured(tmp_path):
    with pytest.raises(TierError, match=r"no \[published\] table"):
        calibrate(load_tier("nano-steps", calibrated=False))
    for text, why in [
        ('extends = "nano-steps"\n[published]\nsigma = 0.01\nsource = "me"', "what its own records count as"),
        ('extends = "small-steps"\n[data]\npublic = "fineweb_val_000000[0:2000000]"', "how its public and hidden"),
    ]:
        (tmp_path / "env.toml").write_text(text)
        with pytest.raises(TierError, match=why):
            calibrate(load_tier(tmp_path, calibrated=False))


# --- a tier that extends another ---


def extending(folder, text):
    folder.mkdir()
    (folder / "env.toml").write_text(text)
    return folder


def test_one_line_makes_a_new_anchor(tmp_path):
    folder = extending(
        tmp_path / "mine", 'extends = "small-steps"\nname = "mine"\n[human]\nanchor = "after 2026-05-25"'
    )
    tier = load_tier(folder)
    assert tier.span().anchor == "#46"
    assert tier.task == load_tier("small-steps").task
    again = extending(tmp_path / "again", 'extends = "../mine"\ngpus = 8\n[human]\nanchor = "before 2026-05-25"')
    tier = load_tier(again)
    assert (tier.span().anchor, tier.name, tier.table.gpus) == ("#41", "mine", 8)
    assert tier.corpus_folder().name == "fineweb10B"
    job = tier.job({"optimizer.py": ""}, tier.plan(100, 100), "1", (tier.table.data.hidden,))
    assert (job.ranks, job.gpus, job.exchange) == (8, 8, "cuda")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('extends = "small-steps"\ngpus = 3', r"must be multiples of gpus \(3\)"),
        ('extends = "small-steps"\n[training]\ntarget = 3.3', "changed after its calibration"),
        ('extends = "nowhere"', "no tier 'nowhere'"),
        ("extends = 3", "must name a tier"),
        ('extends = "."', "which extends this tier"),
        ('extends = "small-steps"\nmistake = 1', "mistake"),
        ('extends = "small-wallclock"\n[limits]\ncompile_s = 0', "both positive"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, text, told):
    with pytest.raises(TierError, match=told):
        load_tier(extending(tmp_path / "mine", text))


def test_own_records_as_anchor_replace_the_public_ones(tmp_path):
    folder = extending(tmp_path / "mine", 'extends = "small-steps"\n[reward]\nanchor = "muon"')
    assert load_tier(folder, calibrated=False).table.human is None


# --- the public track's model ---


def test_the_public_model_computes_what_its_description_says():
    config = model.ModelConfig(layers=1, width=32, heads=2, vocab_size=64, seq_len=16, public=True)
    net = model.GPT(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, 0.3)
    p = dict(net.named_parameters())
    ids = torch.randint(64, (2, 17))
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def norm(x, name):
        return x / x.square().mean(-1, keepdim=True).add(torch.finfo(torch.float32).eps).sqrt() * p[f"{name}.gains"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def rotated(x):  # (2, 16, heads, 16): pairs (i, i + 8); the first four turn
        angle = torch.arange(16.0)[:, None, None] * 1024.0 ** -(torch.arange(4) / 3)
        turned = torch.polar(torch.ones_like(angle), -angle)
        z = torch.complex(x[..., :8], x[..., 8:])
        z = torch.cat((z[..., :4] * turned, z[..., 4:]), -1)
        return torch.cat((z.real, z.imag), -1)

    x = norm(p["embed.weight"][inputs], "embed_norm")
    h = norm(x, "blocks.0.attn_norm")
    q, k, v = (linear(h, f"blocks.0.attn.{n}").view(2, 16, 2, 16) for n in "qkv")
    q, k = (rotated(t / t.square().mean(-1, keepdim=True).sqrt()) for t in (q, k))
    scores = 0.12 * torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).softmax(-1)
    x = x + linear(torch.einsum("bhqk,bkhd->bqhd", scores, v).reshape(2, 16, 32), "blocks.0.attn.proj")
    x = x + linear(linear(norm(x, "blocks.0.mlp_norm"), "blocks.0.mlp.up").relu() ** 2, "blocks.0.mlp.down")
    logits = linear(norm(x, "head_norm"), "head")
    logits = 15 * logits / (logits**2 + 225).sqrt()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert net(inputs, targets).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_public_model_has_even_halves_and_plain_initial_values():
    with pytest.raises(ValueError, match="multiple of 4"):
        model.ModelConfig(layers=1, width=20, heads=2, vocab_size=64, seq_len=16, public=True)
    net = model.GPT(model.ModelConfig(layers=1, width=32, heads=2, vocab_size=64, seq_len=16, public=True))
    net.initialize(torch.Generator().manual_seed(0))
    for name, p in net.named_parameters():
        if p.ndim < 2:
            assert (p == (1 if name.endswith("gains") else 0)).all()
        else:
            assert p.detach().std() == pytest.approx(0.02, rel=0.2)


# --- in small, on the CPU ---


def run(backend, tier, sources=None, steps=30, **changes):
    plan = tier.plan(steps, steps) if tier.name.endswith("steps") else None
    sources = sources or tier.record(tier.table.reward.start).sources
    job = tier.job(sources, plan, "1", ("val_hidden",))
    return backend.start(job.model_copy(update=changes)).result(300)


def test_small_steps_is_the_same_on_one_and_two_devices(cold, tmp_path, monkeypatch):
    tier = toy(tmp_path / "toy", "small-steps", monkeypatch, numbers="fp32")
    one, two = run(cold, tier), run(cold, tier, ranks=2)
    assert one.completed and two.completed, (one.log, two.log)
    assert two.hardware["devices"] == 2
    assert one.train_losses == pytest.approx(two.train_losses, abs=1e-5)
    assert one.val_losses["val_hidden"] == pytest.approx(two.val_losses["val_hidden"], abs=1e-5)
    assert one.val_losses["val_hidden"] < 5.6


def test_small_steps_compiled_and_in_bfloat16(cold, tmp_path, monkeypatch):
    plain = run(cold, toy(tmp_path / "plain", "small-steps", monkeypatch, numbers="fp32"), steps=6)
    compiled = run(cold, toy(tmp_path / "toy", "small-steps", monkeypatch, compile="true"), steps=6)
    assert compiled.completed, (compiled.detail, compiled.log)
    assert compiled.hardware["numbers"] == "bf16"
    assert compiled.val_losses["val_hidden"] == pytest.approx(plain.val_losses["val_hidden"], abs=0.05)
    assert compiled.val_losses != plain.val_losses


def test_an_episode_of_small_steps_pays_by_the_public_records(tmp_path, monkeypatch):
    tier = toy(tmp_path / "toy", "small-steps", monkeypatch, target=5.3)
    with contextlib.closing(Speedrun(tier.folder, state_dir=tmp_path / "state")) as env:
        env.reset()
        *_, info = env.step(Run(horizon=40))
        assert info["run"]["exit_reason"] == "completed"
        _, reward, _, _, info = env.step(Submit(claim=40, horizon=40))
        assert info["verdict"]["accepted"], info
        assert reward == pytest.approx((3500 - 40) / (3500 - 2690))


def test_the_start_program_trains_and_is_audited(cold, tmp_path, monkeypatch):
    result = run(cold, toy(tmp_path / "toy", "small-wallclock", monkeypatch, tokens=2048 * 20))
    assert result.completed, (result.detail, result.log)
    assert result.tokens == 2048 * 20
    assert result.val_losses["val_hidden"] < 5.9
    assert result.audits["val_hidden"].max_abs_d < 1e-4
    assert result.sandbox.trusted


def test_the_start_program_is_the_same_on_one_and_two_devices(tmp_path, monkeypatch):
    """Two processes in one sandbox, which only a container with GPUs allows: here the plain one stands for it."""
    tier = toy(tmp_path / "toy", "small-wallclock", monkeypatch, tokens=2048 * 8)
    sources = tier.record("modern").sources
    losses = []
    with contextlib.closing(LocalBackend("plain")) as backend:
        for count in (1, 2):
            text = sources["train.py"].replace("max(1, torch.cuda.device_count())", str(count))
            result = run(backend, tier, {**sources, "train.py": text})
            assert result.completed, (result.detail, result.log)
            assert result.tokens == 2048 * 8
            losses.append(result.val_losses["val_hidden"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_processes_of_a_candidate_are_for_tiers_with_gpus(cold, tmp_path, monkeypatch):
    tier = toy(tmp_path / "toy", "small-wallclock", monkeypatch)
    sources = tier.record("modern").sources
    text = sources["train.py"].replace("max(1, torch.cuda.device_count())", "2")
    result = run(cold, tier, {**sources, "train.py": text})
    assert result.exit_reason == "candidate_error"
    assert "PermissionError" in result.log


def test_nanogpt_bench_is_judged_by_ten_fixed_runs():
    tier = load_tier("nanogpt-bench")
    assert tier.trial_fields() == {"fixed": {"runs": 10, "p": 0.01, "target": 3.28}}
    assert tier.table.budget.device_seconds == 512 * 3600
    assert tier.records.keys() == load_tier("small-wallclock").records.keys()
    with pytest.raises(TierError, match="29 is no better than record 62"):
        tier.span("#62", "#29")


# --- a public record's script, adapted ---

SCRIPT = ROOT / "examples" / "public_record" / "train_gpt.py"


def test_the_script_before_and_after(cold, tmp_path, monkeypatch):
    """Both train the same model as well, on other orders of the same text: the one as torchrun starts it, the other as
    a run of its tier."""
    shards = data.unpack(ROOT / "gpu_backend" / "corpora" / "shakespeare", cache_dir(), {"train", "val_hidden"})
    sizes = [16 * 128 * 20, 16, 128, 40, 0.6, 1024, 2, 64, 2]
    arguments = [shards["train"], shards["val_hidden"], *sizes]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, *arguments]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    before = re.search(r"step:40/40 val_loss:(\S+) train_time:\d+ms", done.stdout)
    assert before, done.stdout + done.stderr
    folder = toy(tmp_path / "toy", SCRIPT.parent / "tier", monkeypatch, tokens=2048 * 40)
    after = run(cold, folder)
    assert after.completed, (after.detail, after.log)
    assert after.val_losses["val_hidden"] == pytest.approx(float(before[1]), abs=0.1)
    assert not any(judge_source(text, name) for name, text in folder.record("start").sources.items())


# --- benchmarks ---


@pytest.mark.parametrize(("script", "base", "options"), [
    ("steps.py", "small-steps", ["--steps", "8", "--repeats", "2"]),
    ("wallclock.py", "medium-wallclock", ["--steps", "4", "--repeats", "1"]),
])  # fmt: skip
def test_the_benchmarks_run_in_small(tmp_path, monkeypatch, script, base, options):
    tier = toy(tmp_path / "toy", base, monkeypatch)
    output = tmp_path / "result.json"
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu" / script,
        "--tier",
        tier.folder,
        "--output",
        output,
        *options,
    ]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert min(found["tokens_per_second"].values()) > 0
    assert found["command"].startswith(f"python benchmarks/gpu/{script} --tier")
    if script == "steps.py":
        losses = found["last_losses"]
        assert losses["plain"] == pytest.approx(losses["isolated"], abs=0.3)
        assert losses["in_process"] == pytest.approx(losses["isolated"], abs=0.3)
    else:
        assert found["max_abs_d"] < 1e-4
