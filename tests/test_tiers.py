"""A tier loads, or the error names file and field."""

import json

import pytest
from helpers import ANCHOR, BOUNDARY, START, copy_tier, edit, make_tier, write_calibration

from nanogpt_env.errors import ActionError, TierError
from nanogpt_env.tables import StepsCalibration
from nanogpt_env.tiers import CALIBRATION, builtin_tiers, find_tier, load_calibration, load_tier
from nanogpt_env.types import Plan


@pytest.fixture
def folder(tmp_path):
    return copy_tier(tmp_path)


def refused(folder, *named, **options):
    with pytest.raises(TierError) as caught:
        load_tier(folder, **options)
    for text in named:
        assert text in str(caught.value)


def change_calibration(folder, **changes):
    path = folder / CALIBRATION
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_line(path, key, line):
    """Write `line` for the only line of env.toml that sets `key`."""
    lines = path.read_text().splitlines()
    at = [i for i, text in enumerate(lines) if text.split("=")[0].strip() == key]
    assert len(at) == 1
    lines[at[0]] = line
    path.write_text("\n".join(lines) + "\n")


# --- what loads ---


def test_a_copy_loads(folder):
    tier = load_tier(folder)
    assert tier.folder == folder
    assert tier.name == "nano-steps"
    assert tier.task == (folder / "task.md").read_text()
    assert list(tier.records) == ["adamw", "adamw-cooldown", "adamw-groups", "muon", "normuon"]
    assert tier.files == ("optimizer.py",)
    assert tier.records["muon"].sources == {"optimizer.py": (folder / "records" / "muon" / "optimizer.py").read_text()}
    assert load_calibration(folder / CALIBRATION, StepsCalibration) == tier.measured
    assert (tier.value_of("adamw"), tier.value_of("normuon")) == (START, ANCHOR)
    assert tier.loss_test().boundary == BOUNDARY
    assert tier.loss_test().target == tier.table.training.target


def test_a_path_may_be_text(folder):
    assert load_tier(str(folder)).folder == folder


def test_builtin_tiers_load_by_name():
    assert {"nano-steps", "micro-steps"} <= set(builtin_tiers())
    assert load_tier("nano-steps", calibrated=False).name == "nano-steps"
    assert find_tier("nano-steps").name == "nano-steps"


def test_the_level_is_spent_over_the_submissions(folder):
    table = load_tier(folder).table
    assert load_tier(folder).level() == table.verification.alpha / table.budget.submissions


def test_a_job_holds_what_the_trainer_needs(folder):
    tier = load_tier(folder)
    job = tier.job({"optimizer.py": "x = 1"}, Plan(steps=200, horizon=300), "seed", ("val_public",))
    assert (job.source, job.steps, job.horizon, job.seed) == ("x = 1", 200, 300, "seed")
    assert job.final_shards == ("val_public",)
    assert list(job.points) == sorted({round(p * 300) for p in tier.table.training.points})
    assert job.limits.memory_bytes == tier.table.limits.memory_mib * 2**20
    assert job.cores == ()  # whoever starts it says
    assert tier.job({"optimizer.py": "x"}, Plan(steps=1, horizon=1), "s", ("val_public",)).points[0] == 1


@pytest.mark.parametrize(
    ("horizon", "steps", "plan"),
    [(None, None, (300, 300)), (100, None, (100, 100)), (None, 50, (50, 50)), (100, 50, (50, 100)),
     (600, 1, (1, 600)), (600, 600, (600, 600))],
)  # fmt: skip
def test_a_plan_from_what_the_agent_gave(horizon, steps, plan):
    found = make_tier().plan(horizon, steps)
    assert (found.steps, found.horizon) == plan


@pytest.mark.parametrize(("horizon", "steps"), [(100, 101), (601, None), (601, 5), (None, 601), (-1, None), (100, -1)])
def test_a_plan_that_makes_no_sense_is_refused(horizon, steps):
    with pytest.raises(ActionError, match="1 <= steps <= horizon <= 600"):
        make_tier().plan(horizon, steps)


def test_a_run_may_use_what_its_steps_take():
    tier = make_tier()
    most = tier.most(Plan(steps=20, horizon=300))
    assert most == {"flops": 20 * 1024 * tier.flops_per_token(), "tokens": 20 * 1024}


def test_the_trial_asks_for_the_claim_whatever_came_before():
    tier = make_tier()
    trial = tier.trial(Plan(steps=200, horizon=300), 266.0, 180.0)
    assert (trial.test, trial.value(), trial.outcome) == (tier.loss_test(), 200, "continue")
    assert trial.turn().role == "candidate" and trial.turn().session == 0
    assert tier.trial_fields() == {"loss": {k: float(v) for k, v in vars(tier.loss_test()).items()}}
    json.dumps(tier.trial_fields(), allow_nan=False)


def test_values_are_shown_in_steps():
    assert make_tier().format(START) == "266 steps"


def test_flops_of_a_token():
    """By hand for 2 layers of width 64, 1024 ids, 128 tokens, batches of 8."""
    per_token = 6 * (2 * 12 * 64 * 64 + 1024 * 64) + 12 * 2 * 64 * 128
    assert make_tier().flops_per_token() == per_token
    assert make_tier().tokens_per_step() == 1024


def test_a_corpus_beside_the_tier_comes_first(folder):
    shared = load_tier(folder).corpus_folder()
    assert shared.parent.name == "corpora"
    (folder / shared.name).mkdir()
    assert load_tier(folder, calibrated=False).corpus_folder() == folder / shared.name


# --- what does not ---


def test_no_such_tier(tmp_path):
    refused("pico-steps", "pico-steps", "nano-steps")
    refused(tmp_path, str(tmp_path), "env.toml")


def test_missing_env_toml(folder):
    (folder / "env.toml").unlink()
    refused(folder, "env.toml", str(folder))


def test_missing_task(folder):
    (folder / "task.md").unlink()
    refused(folder, str(folder / "task.md"))


@pytest.mark.parametrize(
    ("key", "line", "field"),
    [
        ("batch_size", "batch_size = 8\nmacro_batch = 4", "training.macro_batch"),
        ("batch_size", "", "training.batch_size"),
        ("batch_size", 'batch_size = "many"', "training.batch_size"),
        ("batch_size", "batch_size = 0", "training.batch_size"),
        ("batch_size", "batch_size = 1.5", "training.batch_size"),
        ("target", "target = -1.0", "training.target"),
        ("points", "points = [0.5, 1.0]", "training.points.1"),
        ("track", 'track = "marathon"', "track"),
        ("name", 'name = "My Tier"', "name"),
        ("alpha", "alpha = 0.9", "verification.alpha"),
        ("submissions", "submissions = 0", "budget.submissions"),
        ("form", 'form = "square"', "reward.form"),
        ("corpus", "corpus = 5", "data.corpus"),
        ("layers", "layers = [2]", "model.layers"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(folder, key, line, field):
    replace_line(folder / "env.toml", key, line)
    refused(folder, str(folder / "env.toml"), field)


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"[a]\n[a]\n", b"name = 'x'\nname = 'y'\n", b""])
def test_env_toml_that_is_no_toml(folder, content):
    (folder / "env.toml").write_bytes(content)
    refused(folder, str(folder / "env.toml"))


def test_task_that_is_no_text(folder):
    (folder / "task.md").write_bytes(b"\xff\xfe")
    refused(folder, str(folder / "task.md"))


def test_a_record_without_optimizer(folder):
    (folder / "records" / "muon" / "optimizer.py").unlink()
    refused(folder, str(folder / "records" / "muon" / "optimizer.py"))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ('technique = "x"\norder = 1\n', "horizon"),
        ('technique = "x"\norder = 1\nhorizon = 0\n', "horizon"),
        ('technique = "x"\norder = "first"\nhorizon = 300\n', "order"),
        ('technique = "x"\norder = 1\nhorizon = 300\nauthor = "me"\n', "author"),
        ('technique = "x"\norder = 1\nhorizon = 300\nname = "other"\n', "name"),
        ('technique = "x"\norder = 1\nhorizon = 300\nsource = "pass"\n', "source"),
        ('technique = "x"\norder = 1\nhorizon = 300\nsources = {"optimizer.py" = "pass"}\n', "sources"),
        ("technique", "'='"),
    ],
)
def test_a_wrong_record_is_named_with_its_file(folder, content, field):
    (folder / "records" / "muon" / "record.toml").write_text(content)
    refused(folder, str(folder / "records" / "muon" / "record.toml"), field)


@pytest.mark.parametrize("key", ["start", "anchor"])
def test_start_and_anchor_are_records(folder, key):
    replace_line(folder / "env.toml", key, f'{key} = "sgd"')
    refused(folder, "sgd", "normuon", calibrated=False)


# --- calibration ---


def test_not_calibrated(tmp_path):
    folder = copy_tier(tmp_path, calibrated=False)
    refused(folder, "is not calibrated", f"nanogpt-env tiers calibrate {folder}")
    tier = load_tier(folder, calibrated=False)
    assert tier.calibration is None
    with pytest.raises(TierError, match="without its calibration"):
        tier.loss_test()


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null", '"x"', "{}", "[" * 100_000, '{"sigma": "x"}'])
def test_a_calibration_that_is_none(folder, content):
    (folder / CALIBRATION).write_text(content)
    refused(folder, str(folder / CALIBRATION))


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"sigma": 0}, "sigma"), ({"sigma": "low"}, "sigma"), ({"sigmas": 1}, "sigmas"), ({"boundary": -1}, "boundary"),
     ({"records": {"adamw": {}}}, "records.adamw.claim"),
     ({"timing": {}}, "timing"), ({"shard_offset": "?"}, "shard_offset")],
)  # fmt: skip
def test_a_wrong_calibration_field_is_named_with_its_file(folder, changes, field):
    change_calibration(folder, **changes)
    refused(folder, str(folder / CALIBRATION), field)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: replace_line(f / "env.toml", "target", "target = 4.0625"),
        lambda f: replace_line(f / "env.toml", "width", "width = 128"),
        lambda f: replace_line(f / "env.toml", "batch_size", "batch_size = 9"),
        lambda f: replace_line(f / "env.toml", "n_min", "n_min = 6"),
        lambda f: edit(f / "env.toml", "[data]\n", '[data]\nhidden = "val_public"\n'),
        lambda f: replace_line(f / "env.toml", "anchor", 'anchor = "muon"'),
        lambda f: edit(f / "records" / "muon" / "optimizer.py", "MOMENTUM = 0.9\n", "MOMENTUM = 0.95\n"),
    ],
)  # fmt: skip
def test_a_stale_calibration_is_refused(folder, change):
    before = load_tier(folder).fingerprint()
    change(folder)
    assert load_tier(folder, calibrated=False).fingerprint() != before
    refused(folder, "changed after its calibration", "nanogpt-env tiers calibrate")


@pytest.mark.parametrize(
    ("key", "line"),
    [("summary", 'summary = "another"'), ("runs", "runs = 1000"), ("slots", "slots = 2"),
     ("deadline_s", "deadline_s = 1")],
)  # fmt: skip
def test_what_calibration_does_not_rest_on_may_change(folder, key, line):
    replace_line(folder / "env.toml", key, line)
    load_tier(folder)


def test_another_number_of_submissions_needs_another_boundary(folder):
    replace_line(folder / "env.toml", "submissions", "submissions = 3")
    refused(folder, "boundary", "submissions", "--recompute")


def test_a_boundary_too_small_for_the_level(folder):
    write_calibration(folder, boundary=1.5)
    refused(folder, "boundary 1.5 is too small")


def test_start_must_be_slower_than_anchor(folder):
    replace_line(folder / "env.toml", "start", 'start = "normuon"')
    replace_line(folder / "env.toml", "anchor", 'anchor = "adamw"')
    write_calibration(folder)
    refused(folder, "start record normuon (141 steps)", "slower than anchor adamw (266 steps)")


def test_a_record_without_a_value(folder):
    tier = load_tier(folder)
    with pytest.raises(TierError, match=r"'muon'.*adamw, normuon.*--value muon"):
        tier.value_of("muon")
    with pytest.raises(TierError, match="no record 'sgd'"):
        tier.value_of("sgd")


@pytest.mark.parametrize("missing", ["adamw", "normuon"])
def test_start_and_anchor_must_be_calibrated(folder, missing):
    records = json.loads((folder / CALIBRATION).read_text())["records"]
    del records[missing]
    change_calibration(folder, records=records)
    refused(folder, missing, "no measured value")


def test_a_missing_corpus_is_named(folder):
    replace_line(folder / "env.toml", "corpus", 'corpus = "tolstoy"')
    refused(folder, "tolstoy")
