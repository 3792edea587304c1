"""Calibration on synthetic runs whose crossing, slope and noise are known."""

import contextlib
import functools
import json
import math
import shutil
import threading

import numpy as np
import pytest
from conftest import TINY
from fakes import ran
from helpers import edit

from nanogpt_env import calibrate as c
from nanogpt_env import cli, cli_tiers, stats
from nanogpt_env import measure as shared
from nanogpt_env.errors import BackendError, TierError
from nanogpt_env.stats import boundary_constant, upper_sd
from nanogpt_env.tiers import load_tier, write_calibration

SLOPE, SD, OFFSET, OFFSET_SD = 0.008, 0.01, 0.011, 0.005
SEEDS, RERUNS = 8, 40
PATHS = 20_000  # a tenth of the real number: simulated noise paths of the power


class Synthetic:
    """Loss falls by SLOPE a step through the target at the crossing of the source's record. Each run shifts the whole
    curve by N(0, SD), and reads the public shard OFFSET above the hidden one."""

    def __init__(self, tier, crossings, breaks=lambda number: None, salt=2):
        self.target = tier.table.training.target
        self.crossings = {tier.records[name].sources["optimizer.py"]: step for name, step in crossings.items()}
        self.breaks, self.salt = breaks, salt
        self.jobs = []
        self.most_at_once = self.now = 0
        self._lock = threading.Lock()

    def start(self, job):
        with self._lock:
            self.jobs.append(job)
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
            return Run(self, job, len(self.jobs))

    def result(self, job, number):
        outcome = self.breaks(number)
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is not None:
            return ran(job, 9.0, reason=outcome, detail="broken", log="what it printed")
        rng = np.random.default_rng([self.salt, number])
        shift, offset = rng.normal(0, SD), rng.normal(OFFSET, OFFSET_SD)

        def loss(step):
            return self.target - SLOPE * (step - self.crossings[job.source]) + shift

        points = tuple((s, loss(s)) for s in (*(p for p in job.points if p < job.steps), job.steps))
        losses = {"val_hidden": loss(job.steps), "val_public": loss(job.steps) + offset}
        return ran(job, 0.0, val_points=points, val_losses={s: losses[s] for s in job.final_shards})


class Run:
    def __init__(self, backend, job, number):
        self.backend, self.job, self.number = backend, job, number

    def result(self, timeout=None):
        try:
            return self.backend.result(self.job, self.number)
        finally:
            with self.backend._lock:
                self.backend.now -= 1

    def cancel(self):
        pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "BOUNDARY_PATHS", 400_000)
    for module, name in ((c, "margin_for_power"), (c, "predicted_power"), (shared, "predicted_power")):
        monkeypatch.setattr(module, name, functools.partial(getattr(stats, name), paths=PATHS))
    monkeypatch.setenv("NANOGPT_ENV_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """tiny-steps without a calibration: `slow` crosses at 0.8 of 120 steps, `fast` at 0.8 of 70."""
    shutil.copytree(TINY, tmp_path / "tier")
    (tmp_path / "tier" / "calibration.json").unlink()
    for name, horizon in (("slow", 120), ("fast", 70)):
        path = tmp_path / "tier" / "records" / name / "record.toml"
        lines = [x for x in path.read_text().splitlines() if not x.startswith("horizon")]
        path.write_text("\n".join([*lines, f"horizon = {horizon}"]) + "\n")
    return tmp_path / "tier"


CROSSINGS = {"slow": 96.0, "fast": 56.0}


def uncalibrated(folder):
    return load_tier(folder, calibrated=False)


def measure(tier, backend=None, **options):
    backend = backend or Synthetic(tier, CROSSINGS)
    return c.calibrate(tier, backend, **{"seeds": SEEDS, "reruns": RERUNS, **options}), backend


# --- what is measured ---


def test_the_truth_is_found(folder):
    tier = uncalibrated(folder)
    measured, _ = measure(tier)
    test = c.loss_test(tier, measured.sigma, measured.boundary)
    for name, crossing in CROSSINGS.items():
        record = measured.records[name]
        spread = SD / SLOPE  # a loss that is off by one sd crosses so many steps off
        assert record.steps_mean == pytest.approx(crossing, abs=4 * spread / math.sqrt(SEEDS))
        assert 0.3 * spread < record.steps_sd < 2 * spread
        assert record.steps_n == SEEDS
        assert record.value_n in (RERUNS, 2 * RERUNS)  # one pass, or a second at a better claim
        value = crossing + c.margin_for_power(test, SD, 0.9) / SLOPE
        assert record.value == pytest.approx(value, abs=4 * record.value_error)
        assert 0.1 * spread < record.value_error < spread
        assert record.loss_sd == pytest.approx(SD, rel=0.5)
        assert record.value < record.claim <= tier.records[name].horizon
    assert measured.shard_offset == pytest.approx(OFFSET, abs=4 * OFFSET_SD / math.sqrt(2 * RERUNS))
    assert measured.shard_offset_sd == pytest.approx(OFFSET_SD, rel=0.4)
    assert measured.shard_offset_error == pytest.approx(OFFSET_SD / math.sqrt(2 * RERUNS), rel=0.4)


def test_every_figure_follows_from_the_evidence(folder):
    tier = uncalibrated(folder)
    measured, _ = measure(tier)
    evidence, target = measured.evidence, tier.table.training.target
    values = evidence["values"]
    raw, public = ({n: np.array(v[key]) for n, v in values.items()} for key in ("hidden_losses", "public_losses"))
    # every pass counts, brought to the claim of the last one by the curve's slope
    hidden = {n: raw[n] + v["slope"] * (np.array(v["claims"]) - v["claim"]) for n, v in values.items()}
    assert any(len(set(v["claims"])) > 1 for v in values.values())

    groups = [(float(x.std(ddof=1)), len(x)) for x in hidden.values()]
    assert measured.sigma == pytest.approx(upper_sd(groups)[1], rel=1e-4)
    assert measured.sigma > max(0.0, min(sd for sd, _ in groups))

    test = c.loss_test(tier, measured.sigma, measured.boundary)
    for name, record in measured.records.items():
        value, curve = values[name], evidence["curves"][name]
        needed = c.margin_for_power(test, float(hidden[name].std(ddof=1)), 0.9)
        expected = value["claim"] + (needed - (target - hidden[name].mean())) / value["slope"]
        assert record.value == pytest.approx(expected, abs=0.06)  # given to 0.1 step
        assert value["slope"] == pytest.approx(SLOPE, rel=1e-3)
        assert abs(value["claim"] - record.value) <= max(1.0, record.value_error) + 0.06
        crossings = [np.interp(-target, -np.array(row), curve["steps"]) for row in curve["hidden_losses"]]
        assert record.steps_mean == pytest.approx(np.mean(crossings), abs=1e-3)
        assert record.steps_sd == pytest.approx(np.std(crossings, ddof=1), abs=1e-3)
        # the claim for demonstrations is the first that is as good as sure, by curve and reruns, with slack
        mean = np.array(curve["hidden_losses"]).mean(axis=0)
        shift = hidden[name].mean() - np.interp(value["claim"], curve["steps"], mean)
        shift += c.SLACK * measured.sigma / math.sqrt(record.value_n)
        margins = [target - np.interp(k, curve["steps"], mean) - shift for k in (record.claim - 1, record.claim)]
        power = [c.predicted_power(test, m, record.loss_sd, record.value_n) for m in margins]
        assert power[0] < c.SURE <= power[1]

    differences = [public[n] - raw[n] for n in ("slow", "fast")]
    assert measured.shard_offset == pytest.approx(np.mean([d.mean() for d in differences]), abs=1e-5)
    assert measured.shard_offset_sd == pytest.approx(math.sqrt(np.mean([d.var(ddof=1) for d in differences])), rel=1e-3)
    assert evidence["versions"] == {"torch": "0"}
    assert evidence["sandbox"]["name"] == "fake"


def test_boundary_and_power_belong_to_the_tiers_test(folder):
    tier = uncalibrated(folder)
    measured, _ = measure(tier)
    v = tier.table.verification
    constant, error = boundary_constant(tier.level(), v.n_min, v.n_max, paths=400_000)
    assert constant + 2 * error <= measured.boundary < constant + 2 * error + 1e-3
    assert measured.boundary_level == tier.level() == v.alpha / tier.table.budget.submissions
    test = c.loss_test(tier, measured.sigma, measured.boundary)
    margins = measured.power["margins_in_sigma"]
    assert (margins[0], margins[-1]) == (0, 3)
    sds = sorted(r.loss_sd for r in measured.records.values())
    for which, sd in (("lowest_sd", sds[0]), ("highest_sd", sds[-1])):
        row = measured.power[which]
        assert row["sd"] == sd
        assert row["power"] == sorted(row["power"])
        assert row["power"][0] <= tier.level()
        for margin, power in zip(margins, row["power"], strict=True):
            assert power == pytest.approx(c.predicted_power(test, margin * measured.sigma, sd), abs=1e-4)


def test_what_was_written_is_a_tier_ready_for_use(folder):
    measured, _ = measure(uncalibrated(folder))
    write_calibration(folder / "calibration.json", measured)
    tier = load_tier(folder)
    assert tier.measured == measured
    assert tier.value_of("slow") > tier.value_of("fast")
    assert tier.loss_test().boundary == measured.boundary
    assert [p.name for p in folder.glob("*.part")] == []


def test_a_record_is_valued_when_asked(folder):
    shutil.copytree(folder / "records" / "slow", folder / "records" / "middle")
    path = folder / "records" / "middle" / "optimizer.py"
    path.write_text(path.read_text() + "\nMIDDLE = 1\n")
    tier = uncalibrated(folder)
    crossings = {**CROSSINGS, "middle": 94.0}
    measured, _ = measure(tier, Synthetic(tier, crossings))
    assert measured.records["middle"].value is None
    assert measured.records["middle"].steps_n == SEEDS
    measured, backend = measure(tier, Synthetic(tier, crossings), value=["middle"])
    assert measured.records["middle"].value_n >= RERUNS
    assert measured.records["middle"].value == pytest.approx(measured.records["slow"].value - 2, abs=4)
    # the others were kept
    assert {job.source for job in backend.jobs} == {tier.records["middle"].sources["optimizer.py"]}


# --- how it is run ---


def test_the_jobs(folder):
    tier = uncalibrated(folder)
    _, backend = measure(tier)
    curves = [job for job in backend.jobs if job.final_shards == ("val_hidden",)]
    values = [job for job in backend.jobs if job.final_shards == ("val_hidden", "val_public")]
    assert len(curves) == 2 * SEEDS
    assert len(curves) + len(values) == len(backend.jobs)
    assert len(values) >= 2 * RERUNS and len(values) % RERUNS == 0
    assert len({job.seed for job in backend.jobs}) == len(backend.jobs)
    for job in curves:
        horizon = next(r.horizon for r in tier.records.values() if r.sources["optimizer.py"] == job.source)
        assert job.steps == job.horizon == horizon
        assert job.points == tuple(round(share * horizon) for share in c.GRID)
        assert job.point_tokens >= 1 << 20  # the whole shard
    assert all(job.steps < job.horizon for job in values)


def test_finished_runs_are_reused_and_fresh_forgets_them(folder):
    tier = uncalibrated(folder)
    first, backend = measure(tier)
    again, idle = measure(tier)
    assert idle.jobs == []
    assert again == first
    fresh, busy = measure(tier, Synthetic(tier, CROSSINGS, salt=1), fresh=True)
    assert len(busy.jobs) >= 2 * (SEEDS + RERUNS)
    assert fresh.evidence["curves"] != first.evidence["curves"]
    assert not {job.seed for job in busy.jobs} & {job.seed for job in backend.jobs}


def test_more_seeds_add_to_those_that_are_there(folder):
    tier = uncalibrated(folder)
    measure(tier)
    _, backend = measure(tier, seeds=SEEDS + 2)
    assert len([job for job in backend.jobs if job.final_shards == ("val_hidden",)]) == 4


def test_only_a_record_that_changed_is_run_again(folder):
    measure(uncalibrated(folder))
    path = folder / "records" / "fast" / "optimizer.py"
    path.write_text(path.read_text() + "\nFASTER = True\n")
    tier = uncalibrated(folder)
    _, backend = measure(tier)
    curves = [job.source for job in backend.jobs if job.final_shards == ("val_hidden",)]
    assert curves == [tier.records["fast"].sources["optimizer.py"]] * SEEDS


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), BackendError("node lost")])
@pytest.mark.parametrize("after", [5, 30])
def test_interrupted_it_continues_where_it_stopped(folder, stop, after):
    tier = uncalibrated(folder)
    broken = Synthetic(tier, CROSSINGS, lambda number: stop if number > after else None)
    with pytest.raises(type(stop)):
        measure(tier, broken)
    measured, backend = measure(tier)
    assert measured.records["slow"].value_n % RERUNS == 0
    assert (len(backend.jobs) + after - 2 * SEEDS) % RERUNS == 0  # nothing was run twice


def test_a_line_torn_by_a_crash_is_run_again(folder, tmp_path):
    tier = uncalibrated(folder)
    measure(tier)
    path = tmp_path / "cache" / "calibration" / "tiny-steps.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    measured, backend = measure(tier)
    assert len(backend.jobs) % RERUNS == 1
    again, backend = measure(tier)  # what was written after the torn line counts, or is run again
    assert len(backend.jobs) % RERUNS <= 1
    assert again.records["slow"].value_n == measured.records["slow"].value_n


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_bound_the_runs_at_a_time(folder, workers):
    tier = uncalibrated(folder)
    _, backend = measure(tier, workers=workers)
    assert 1 <= backend.most_at_once <= workers


def test_progress_is_reported(folder):
    told = []
    measure(uncalibrated(folder), report=lambda *line: told.append(line))
    for what in ("slow: curve", "fast: curve"):
        assert [line for line in told if line[0] == what] == [(what, i, SEEDS) for i in range(SEEDS + 1)]
    assert ("boundary", 1, 1) in told
    assert any(what.startswith("fast: value at step") and done == total == RERUNS for what, done, total in told)


# --- tiers that cannot be calibrated ---


def test_two_calibrations_of_a_tier_do_not_run_at_once(folder):
    tier = uncalibrated(folder)
    first = shared.Runs(tier, Synthetic(tier, CROSSINGS), 1, shared.silent, False)
    with contextlib.closing(first), pytest.raises(TierError, match="another calibration of tier tiny-steps is running"):
        measure(tier)
    measure(tier)


@pytest.mark.parametrize(
    ("crossing", "text"),
    [
        (80.0, "record fast misses the target .* within its horizon of 70 steps"),
        (69.0, "record fast (misses the target|ends at a mean loss)"),
        (30.0, "record fast is below the target 5 already at step 49"),
    ],
)
def test_a_horizon_that_does_not_fit_is_refused(folder, crossing, text):
    tier = uncalibrated(folder)
    with pytest.raises(TierError, match=text):
        measure(tier, Synthetic(tier, {**CROSSINGS, "fast": crossing}))


def test_a_record_that_fails_is_named_with_its_log(folder):
    tier = uncalibrated(folder)
    with pytest.raises(TierError, match=r"slow: curve: candidate_error: broken\nwhat it printed"):
        measure(tier, Synthetic(tier, CROSSINGS, lambda number: "candidate_error" if number == 3 else None))


# --- new arithmetic on old losses ---


def test_recompute_gives_the_same_from_the_same(folder):
    tier = uncalibrated(folder)
    first, _ = measure(tier)
    again = c.recompute(tier, first)
    assert again.sigma == pytest.approx(first.sigma, rel=1e-4)
    for name, record in first.records.items():
        assert again.records[name].model_dump() == pytest.approx(record.model_dump(), rel=1e-3, abs=0.1)
    assert again.fingerprint == first.fingerprint
    assert again.boundary == first.boundary


def test_recompute_follows_a_changed_target_and_level(folder):
    first, _ = measure(uncalibrated(folder))
    target = uncalibrated(folder).table.training.target
    edit(folder / "env.toml", f"target = {target}", f"target = {target - 2 * SLOPE:.3f}")
    edit(folder / "env.toml", "submissions = 5", "submissions = 4")
    tier = uncalibrated(folder)
    new = c.recompute(tier, first)
    assert new.boundary_level == tier.level() != first.boundary_level
    assert new.boundary < first.boundary  # more of the level for each of fewer submissions
    for name, record in new.records.items():
        assert record.steps_mean == pytest.approx(first.records[name].steps_mean + 2, abs=0.01)
        assert record.value == pytest.approx(first.records[name].value + 2, abs=1.0)
    write_calibration(folder / "calibration.json", new)
    assert load_tier(folder).measured == new


def test_recompute_refuses_what_the_losses_do_not_tell(folder):
    first, _ = measure(uncalibrated(folder))
    target = uncalibrated(folder).table.training.target
    edit(folder / "env.toml", f"target = {target}", f"target = {target - 5 * SLOPE:.3f}")
    with pytest.raises(TierError, match=r"was rerun at step \d+, but its value would now be"):
        c.recompute(uncalibrated(folder), first)
    edit(folder / "env.toml", "batch_size = 8", "batch_size = 16")
    with pytest.raises(TierError, match="must be run again"):
        c.recompute(uncalibrated(folder), first)


# --- the command ---


@pytest.fixture
def command(monkeypatch, folder, capsys):
    """`nanogpt-env tiers calibrate` in this process, on synthetic runs: (exit code, its JSON or text)."""

    def call(*options):
        backend = Synthetic(uncalibrated(folder), CROSSINGS)
        backend.close = lambda: None
        monkeypatch.setattr(cli_tiers, "LocalBackend", lambda *_, **__: backend)
        arguments = ["tiers", "calibrate", str(folder), "--seeds", str(SEEDS), "--reruns", str(RERUNS), *options]
        code = cli.app(arguments, standalone_mode=False)
        return code, capsys.readouterr().out, backend

    return call


def test_the_command_writes_the_calibration(command, folder):
    code, out, backend = command("--json")
    measured = load_tier(folder).measured
    assert code == 0
    assert {len(job.cores) for job in backend.jobs} == {1}  # each waited for its turn at one
    assert command("--fresh")[2].jobs
    assert command()[2].jobs == []  # whichever core they had, finished runs are kept
    assert load_tier(folder).measured.sigma > 0
    assert json.loads(out) == json.loads(measured.model_dump_json(exclude={"evidence"}))


def test_a_dry_run_writes_nothing(command, folder):
    code, out, _ = command("--dry-run")
    assert code == 0
    assert json.loads(out)["sigma"] > 0
    assert not (folder / "calibration.json").exists()


def test_the_command_recomputes_without_training(command, folder):
    command()
    edit(folder / "env.toml", "submissions = 5", "submissions = 4")
    with pytest.raises(TierError, match="calibrate"):
        load_tier(folder)
    code, _, backend = command("--recompute")
    assert (code, backend.jobs) == (0, [])
    assert load_tier(folder).measured.boundary_level == pytest.approx(0.05 / 4)
