"""Free models: what the audit draws and concludes, what it refuses, and whole runs through the trainer."""

from __future__ import annotations

import math
import operator

import free_models as fm
import numpy as np
import pytest
import torch
from safetensors.torch import load

from nanogpt_env.content import cache_dir
from nanogpt_env.types import AuditRules, WallclockJob

import audit
from audit import Request
from candidate import RunFailed

LENGTH = 64


# --- what is drawn ---


def test_every_position_is_equally_likely_and_each_stratum_has_one():
    rng = np.random.default_rng(0)
    drawn = [[r.sequence * 8 + r.position for r in audit.draw(6, 8, 5, rng)] for _ in range(4000)]
    counts = np.bincount(np.ravel(drawn), minlength=48)
    assert np.abs(counts / 4000 - 5 / 48).max() < 0.03
    bounds = np.linspace(0, 48, 6).round()
    assert all(((bounds[:-1] <= row) & (row < bounds[1:])).all() for row in drawn)
    with pytest.raises(ValueError, match="49 positions"):
        audit.draw(6, 8, 49, rng)


@pytest.mark.parametrize("m", [12, 200, 1000])
def test_no_process_gets_two_of_a_sequence_or_of_a_document(m):
    text = fm.shards()["val_hidden"]
    starts = np.flatnonzero(text == 0)
    requests = audit.draw(1023, LENGTH, m, np.random.default_rng(m))
    groups = audit.rounds(requests, LENGTH, starts)
    key = operator.attrgetter("sequence", "position")
    assert sorted((r for g in groups for r in g), key=key) == sorted(requests, key=key)
    document = np.cumsum(text == 0)
    for group in groups:
        shown = [set(document[r.sequence * LENGTH : r.sequence * LENGTH + r.position + 2]) for r in group]
        assert sum(map(len, shown)) == len(set().union(*shown))
        assert len({r.sequence for r in group}) == len(group)
    assert len(groups) <= 2 if m == 12 else len(groups) > 2


def test_without_documents_only_sequences_are_kept_apart():
    requests = [Request(0, 1), Request(0, 5), Request(1, 0)]
    assert audit.rounds(requests, 8, np.array([], np.int64)) == [[requests[0], requests[2]], [requests[1]]]


def test_a_request_shows_its_prefix_and_then_a_decoy():
    windows = np.arange(20, dtype=np.uint16).reshape(2, 10)
    decoys = np.full((3, 10), 99, np.uint16)
    rows = audit.with_decoys(windows, [Request(1, 3), Request(0, 0)], decoys)
    assert rows.tolist() == [[10, 11, 12, 13] + [99] * 6, [0] + [99] * 9, [99] * 10]


@pytest.mark.parametrize("spread", ["evenly", "in some sequences", "in one place"])
def test_a_cheat_survives_no_more_often_than_the_bound_however_it_is_spread(spread):
    count, m, share, n = 256, 50, 0.02, 4000
    cheated = np.zeros(count * LENGTH, bool)
    rng = np.random.default_rng(1)
    if spread == "evenly":
        cheated[rng.choice(cheated.size, round(share * cheated.size), replace=False)] = True
    elif spread == "in some sequences":
        for s in rng.choice(count, round(share * count), replace=False):
            cheated[s * LENGTH : (s + 1) * LENGTH] = True
    else:
        cheated[: round(share * cheated.size)] = True
    share = cheated.mean()
    drawn = [[r.sequence * LENGTH + r.position for r in audit.draw(count, LENGTH, m, rng)] for _ in range(n)]
    survived = np.mean([not cheated[d].any() for d in drawn])
    bound = (1 - share) ** m
    assert survived < bound + 3 * math.sqrt(bound / n)
    if spread == "evenly":
        assert survived > bound - 0.05


# --- what is concluded ---


def test_the_audited_loss_is_what_the_fresh_answers_say_on_average():
    rng = np.random.default_rng(0)
    fresh, answered = -rng.exponential(4, 4096), np.zeros(4096)
    found = []
    for _ in range(300):
        chosen = rng.choice(4096, 64, replace=False)
        found.append(audit.compare(-answered.mean(), answered[chosen], fresh[chosen]))
    losses = [a.audited_loss for a in found]
    assert np.mean(losses) == pytest.approx(-fresh.mean(), abs=0.15)
    assert np.std(losses) == pytest.approx(np.mean([a.uncertainty for a in found]), rel=0.15)


def test_either_tolerance_refuses():
    rules = audit.AuditRules(4, 0.1, 0.01, 1, 1.0)
    zero = np.zeros(4)
    assert audit.compare(1.0, zero, zero).passes(rules)
    assert not audit.compare(1.0, zero, np.array([0.2, -0.2, 0, 0])).passes(rules)
    assert not audit.compare(1.0, zero, np.full(4, -0.02)).passes(rules)
    assert not audit.compare(1.0, zero, np.full(4, 0.02)).passes(rules)


def test_rows_are_normalised_in_double_precision():
    logits = torch.randn(5, 1024, generator=torch.Generator().manual_seed(0)) * 10 + 1e4
    targets = torch.arange(5)
    expected = logits.double().log_softmax(-1)[torch.arange(5), targets]
    found = audit.log_probabilities(logits.numpy(), targets.numpy())
    assert found == pytest.approx(expected.numpy(), abs=1e-12)


@pytest.mark.parametrize("change", [{"positions": 1}, {"tolerance": float("nan")}, {"mean_tolerance": 0.0}])
def test_rules_that_audit_nothing_are_refused(change):
    good = {"positions": 8, "tolerance": 1e-3, "mean_tolerance": 1e-4, "checkpoint_bytes": 1, "evaluation_s": 1.0}
    audit.AuditRules(**good)
    with pytest.raises(ValueError, match="audit"):
        audit.AuditRules(**{**good, **change})


# --- attacks: the model's answers, its audit, and its honest loss on the same text ---


@pytest.fixture(scope="module")
def texts():
    shards = fm.shards()
    return shards["val_hidden"][: 256 * LENGTH + 1], shards["train"]


@pytest.fixture(scope="module")
def weights(texts):
    torch.set_num_threads(1)
    return fm.trained(texts[1])


@pytest.fixture(scope="module")
def honest_loss(texts, weights):
    """By cross-entropy in this process, written independently of the audited path."""
    model = fm.host.import_source("honest", fm.MODEL).build(load(weights))
    ids = torch.from_numpy(texts[0].astype(np.int64))
    with torch.no_grad():
        logits = model(ids[:-1].view(-1, LENGTH))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:]).item()


def told(name, found, honest_loss):
    """A row of the table in docs/design/free-models.md."""
    claimed, audited = (honest_loss - loss for loss in (found.claimed_loss, found.audited_loss))
    print(
        f"\n| {name} | {found.positions} | {claimed:+.3f} | {audited:+.3f} ± {found.uncertainty:.3f} "
        f"| {found.max_abs_d:.2g} | {found.mean_d:+.2g} |"
    )


@pytest.mark.parametrize("name", fm.HONEST)
def test_attack_table_honest_models_pass(texts, weights, honest_loss, name):
    log = []
    found = fm.evaluate(fm.opener(fm.HONEST[name], weights, log), *texts)
    told(name, found, honest_loss)
    assert found.passes(fm.rules(12))
    assert found.audited_loss == pytest.approx(honest_loss, abs=1e-5)


@pytest.mark.parametrize("name", fm.STATELESS)
def test_attack_table_what_looks_ahead_is_refused(texts, weights, honest_loss, name):
    found = fm.evaluate(fm.here(fm.STATELESS[name], weights), *texts, positions=200)
    told(name, found, honest_loss)
    assert not found.passes(fm.rules(200))
    # unbiased for what a fresh process says, which is never better than the honest model by more than its error
    assert honest_loss - found.audited_loss < 3 * found.uncertainty


@pytest.mark.parametrize("name", fm.ISOLATED)
def test_attack_table_what_a_process_keeps_is_refused(texts, weights, honest_loss, name):
    log = []
    found = fm.evaluate(fm.opener(fm.ISOLATED[name], weights, log), *texts)
    told(name, found, honest_loss)
    assert not found.passes(fm.rules(12)), log
    assert honest_loss - found.audited_loss < 3 * found.uncertainty


def test_attack_table_an_audit_in_the_same_process_accepts_the_cache(texts, weights, honest_loss):
    again, end = fm.one_process(fm.opener(fm.ISOLATED["keeps prefixes in a cache"], weights, []))
    try:
        found = fm.evaluate(again, *texts)
    finally:
        end()
    told("the cache, audited in its own process", found, honest_loss)
    assert honest_loss - found.audited_loss > 3
    assert found.max_abs_d < 0.1  # what is left of D is where contexts of eight tokens occur twice


@pytest.mark.parametrize("name", fm.FAULTS)
def test_a_model_that_fails_ends_the_run(texts, weights, name):
    source, reason = fm.FAULTS[name]
    with pytest.raises(RunFailed) as caught:
        fm.evaluate(fm.opener(source, weights, [], stall_s=4.0), *texts)
    assert caught.value.reason == reason


# --- whole runs ---

RULES = AuditRules(positions=12, tolerance=1e-3, mean_tolerance=1e-4, checkpoint_bytes=1 << 20, evaluation_s=60.0)


def run(backend, tier, *changes, model=fm.MODEL, rules=RULES, shards=("val_public",), tokens=16384):
    source = fm.TRAIN
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    t = tier.table
    job = WallclockJob(
        model=t.model.model_dump(),
        corpus=str(tier.corpus_folder()),
        cache=str(cache_dir()),
        seed="1",
        limits=tier.limits().model_copy(update={"setup_s": 30.0, "stall_s": 15.0}),
        train_shards=t.data.train_shards,
        final_shards=shards,
        sources={"train.py": source, "model.py": model},
        tokens=tokens,
        max_batch_tokens=4096,
        model_rule="free",
        audit=rules,
    )
    return backend.start(job).result(240)


def test_a_free_model_is_trained_and_its_loss_is_the_audited_one(sealed, tier):
    chatty = fm.cheat("calls.append(1)\nprint('call', len(calls))\nreturn net(ids)", "calls = []")
    result = run(sealed, tier, model=chatty, shards=("val_public", "val_hidden"), tokens=65536)
    assert result.exit_reason == "completed", (result.detail, result.log)
    assert set(result.audits) == set(result.val_losses) == {"val_public", "val_hidden"}
    for name, found in result.audits.items():
        assert found.positions == 12
        assert found.max_abs_d < 1e-5
        assert result.val_losses[name] == found.audited_loss == pytest.approx(found.claimed_loss, abs=1e-5)
        assert 4 < found.audited_loss < math.log(1024)
    assert result.flops == 0 < result.train_seconds
    # the first call of an evaluation is on random tokens; what is printed later may be a shard's text
    assert "64 steps" in result.log
    assert "call 1" in result.log
    assert "call 2" not in result.log


def test_a_cheat_ends_the_run_without_a_loss_or_a_hint(sealed, tier):
    result = run(sealed, tier, model=fm.STATELESS["peeks everywhere"])
    assert result.exit_reason == "audit_refused"
    assert result.val_losses == {}
    assert not any(c.isdigit() for c in result.detail)
    assert result.audits["val_public"].max_abs_d > 1


SAVE, DECLARE = "speedrun.save(net.state_dict())", "speedrun.declare(net.state_dict())"
REFUSALS = {
    "nothing was declared": ([(DECLARE, "")], "checkpoint_refused", "(undeclared)"),
    "declares twice": ([(DECLARE, f"{DECLARE}; {DECLARE}")], "candidate_protocol", "23"),
    "declares late": (
        [(DECLARE, ""), ("speedrun.start()", f"speedrun.start(); {DECLARE}")],
        "candidate_protocol",
        "23",
    ),
    "declares too much": ([(DECLARE, "speedrun.declare({'x': torch.zeros(1 << 20)})")], "checkpoint_refused", "(size)"),
    "declares integers": (
        [(DECLARE, "speedrun.declare({'x': torch.zeros(1).int()})")],
        "checkpoint_refused",
        "(dtype)",
    ),
    "saves another dtype": (
        [(SAVE, "speedrun.save({k: v.half() for k, v in net.state_dict().items()})")],
        "checkpoint_refused",
        "(dtype)",
    ),
    "saves another tensor": (
        [(SAVE, "speedrun.save({**net.state_dict(), 'x': torch.zeros(1)})")],
        "checkpoint_refused",
        "(names)",
    ),
    "claims a huge declaration": (
        [(DECLARE, "import host; host.send(speedrun._control, host.DECLARE, 2**31); input()")],
        "checkpoint_refused",
        "(declaration)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_checkpoint_is_held_to_what_was_declared_before_the_start(sealed, tier, name):
    changes, reason, detail = REFUSALS[name]
    result = run(sealed, tier, *changes)
    assert (result.exit_reason, detail in result.detail) == (reason, True), (result.detail, result.log)


def test_an_evaluation_has_a_limited_life(sealed, tier):
    slow = fm.cheat("import time; time.sleep(1)\nreturn net(ids)")
    result = run(sealed, tier, model=slow, rules=RULES.model_copy(update={"evaluation_s": 9.0}))
    assert result.exit_reason == "deadline", result.detail
    assert result.val_losses == {}
