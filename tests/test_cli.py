"""The command `nanogpt-env` as its users run it: a process, its output and its exit code."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from helpers import copy_tier

import nanogpt_env
from nanogpt_env.cli import app
from nanogpt_env.cli_data import data_app
from nanogpt_env.cli_judge import judge_app
from nanogpt_env.cli_records import records_app
from nanogpt_env.cli_tiers import tiers_app
from nanogpt_env.slots import Slots
from nanogpt_env.tiers import builtin_tiers, load_tier
from nanogpt_env.types import RunResult, Verdict

COMMAND = Path(sys.executable).parent / "nanogpt-env"
TIER = load_tier(TINY)
FAST = TIER.records["fast"]
CLAIM = TIER.measured.records["fast"].claim or FAST.horizon
COMMANDS = [
    "doctor", "attack", "image", "tiers list", "tiers show", "tiers plan", "tiers calibrate", "tiers time",
    "records list", "records show", "records plot", "data fetch", "data check", "data path", "judge eval",
    "judge rules", "judge show", "new", "run",
    "submit", "play", "compare", "mcp", "attach", "replay",
]  # fmt: skip


def call(*arguments, env=None, **options):
    """Run the command; whatever happens, it is no traceback."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **(env or {})},
        check=False,
        **options,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def refuse_constant(text):
    raise ValueError(f"{text} is not JSON")


def call_json(*arguments, code=0, **options):
    """The one JSON object that the command prints."""
    done = call(*arguments, "--json", **options)
    assert done.returncode == code, done.stderr
    content = json.loads(done.stdout, parse_constant=refuse_constant)
    assert isinstance(content, dict)
    return content


@pytest.fixture
def candidate(tmp_path):
    """A folder with the anchor's optimizer.py, or another text or bytes."""

    def make(content=FAST.sources["optimizer.py"], name="optimizer.py"):
        folder = tmp_path / "candidate"
        folder.mkdir(exist_ok=True)
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return make


# --- help and misuse ---


def test_the_commands_are_those_tested():
    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    groups = {"tiers": tiers_app, "records": records_app, "data": data_app, "judge": judge_app}
    names += [
        f"{name} {c.name or c.callback.__name__}" for name, group in groups.items() for c in group.registered_commands
    ]
    assert sorted(names) == sorted(COMMANDS)


@pytest.mark.parametrize("command", ["", "tiers", *COMMANDS])
def test_help(command):
    done = call(*command.split(), "--help")
    assert done.returncode == 0
    assert f"nanogpt-env {command}".strip() in done.stdout
    assert "--help" in done.stdout
    assert done.stderr == ""


def test_without_a_command_the_help_is_shown():
    done = call()
    assert done.returncode == 2
    assert "doctor" in done.stdout + done.stderr


def refused(done, *texts, code=2):
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.strip()
    for text in texts:
        assert text in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["run", "submit"])
@pytest.mark.parametrize(
    ("content", "text", "code"),
    [
        (None, "has no optimizer.py", 2),
        (b"# caf\xe9\ndef configure(params, horizon): ...", "is not UTF-8 text", 2),
        ("def configure(params, horizon:\n", "static judge", 1),
        ("import os\ndef configure(params, horizon): ...\n", "line 1: may not import os", 1),
        ("x = 1\n" * 10_000, "may have 16384 bytes", 2),
        ("def configure(params, horizon): ...  # \u202e", "U+202E", 2),
    ],
    ids=["none", "not UTF-8", "syntax", "import", "size", "invisible"],
)
def test_a_candidate_that_is_no_candidate(candidate, command, content, text, code):
    refused(call(command, candidate(content), "--tier", TINY, "--horizon", 50), text, code=code)


def test_a_huge_file_is_not_read(candidate):
    folder = candidate("x = 1\n")
    with open(folder / "optimizer.py", "r+b") as file:
        file.truncate(1 << 40)
    refused(call("run", folder, "--tier", TINY), "may have 16384 bytes, this has 1099511627776", code=2)


@pytest.mark.parametrize(("content", "code"), [("import os\n", 1), (None, 2)])
def test_an_error_is_a_json_object_too(candidate, content, code):
    done = call("submit", candidate(content), "--tier", TINY, "--horizon", 50, "--json")
    found = json.loads(done.stdout)
    assert found["exit_code"] == done.returncode == code
    assert found["error"] in done.stderr
    assert found.get("accepted") is (False if code == 1 else None)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "{missing}", "--tier", TINY], "has no optimizer.py, which tiny-steps asks for; `nanogpt-env new"),
        (["run", "{folder}"], "--tier"),
        (["run", "{folder}", "--tier", "nano"], "no tier 'nano'"),
        (["run", "{folder}", "--tier", TINY, "--steps", "60", "--horizon", "50"], "1 <= steps <= horizon"),
        (["run", "{folder}", "--tier", TINY, "--horizon", "201"], "horizon <= 200"),
        (["run", "{folder}", "--tier", TINY, "--steps", "0"], "--steps"),
        (["run", "{folder}", "--tier", TINY, "--horizon", "many"], "--horizon"),
        (["run", "{folder}", "--tier", TINY, "--seed", "-1"], "--seed"),
        (["run", "{folder}", "--tier", TINY, "--seed", str(2**31)], "seed"),
        (["run", "{folder}", "--tier", TINY, "--sandbox", "chroot"], "auto, docker, bubblewrap, landlock, plain"),
        (["run", "{folder}", "--tier", TINY, "--speed", "9"], "--speed"),
        (["submit", "{folder}", "--tier", TINY, "--claim", "60", "--horizon", "50"], "1 <= steps <= horizon"),
        (["submit", "{folder}", "--tier", TINY, "--claim", "0"], "--claim"),
        (["submit", "{folder}", "--tier", TINY, "--claim", "300"], "<= 200"),
        (["play", "--tier", TINY, "--agent", "genius"], "no agent 'genius': it is one of ladder"),
        (["play", "--tier", TINY, "--output", "{file}"], "File exists"),
        (["play", "--tier", TINY, "--output", "{file}/below"], "Not a directory"),
        (["tiers", "show", "nowhere"], "no tier 'nowhere'"),
        (["tiers", "calibrate", "nowhere"], "no tier 'nowhere'"),
        (["tiers", "calibrate", TINY, "--seeds", "2"], "--seeds"),
        (["tiers", "time", TINY], "tiny-steps is a tier of the steps track"),
        (["tiers", "time", "nowhere"], "no tier 'nowhere'"),
        (["new", "{folder}", "--tier", TINY], "is not empty"),
        (["new", "{file}", "--tier", TINY], "Not a directory"),
        (["new", "{missing}", "--tier", "nowhere"], "no tier 'nowhere'"),
        (["replay", "{missing}"], "cannot read"),
        (["replay", "{folder}"], "cannot read"),
        (["replay", "{file}"], "is no"),
        (["sumbit"], "sumbit"),
    ],
)
def test_misuse(candidate, tmp_path, arguments, text):
    file = tmp_path / "file"
    file.write_text("")
    places = {"folder": candidate(), "file": file, "missing": tmp_path / "missing"}
    refused(call(*(str(a).format(**places) for a in arguments)), text)
    assert not (tmp_path / "missing").exists()


def test_other_python_files_of_a_candidate_are_named(candidate):
    folder = candidate("def configure(params, horizon:\n")
    candidate("x = 1", "helpers.py")
    refused(call("run", folder, "--tier", TINY), "not used: helpers.py", code=1)


@pytest.mark.parametrize("text", ["{}\n", '{"seq": 0, "kind": "episode"\n', '{"seq": 1, "kind": "action"}\n', "\0\n"])
def test_a_damaged_ledger(tmp_path, text):
    path = tmp_path / "ledger.jsonl"
    path.write_text(text)
    refused(call("replay", path), str(path))


# --- places that cannot be written ---


def test_a_state_folder_that_cannot_be_made(candidate, tmp_path):
    (tmp_path / "file").write_text("")
    state = str(tmp_path / "file" / "state")
    refused(call("run", candidate(), "--tier", TINY, env={"NANOGPT_ENV_STATE": state}), "cannot write", state)


def test_a_full_disk(candidate, tmp_path):
    """The limit on file sizes lets a write fail half way, as a full disk does."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))

    done = call(
        "run", candidate(), "--tier", TINY, env={"NANOGPT_ENV_STATE": str(tmp_path / "state")}, preexec_fn=limit
    )
    refused(done, "cannot write", "ledger.jsonl")


def test_a_cache_that_cannot_be_made_is_our_failure(candidate, tmp_path):
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    done = call("run", candidate(), "--tier", TINY, "--horizon", 20, env={"NANOGPT_ENV_CACHE": cache})
    assert done.returncode == 3, done.stderr
    assert "nothing was charged" in done.stderr
    assert "Not a directory" in done.stderr


# --- what trains nothing ---


def test_doctor():
    found = call_json("doctor")
    assert set(found) == {
        "python", "nanogpt_env", "torch", "cores", "cache", "state", "sandboxes", "gpus", "slots", "tiers", "checks",
        "advice",
    }  # fmt: skip
    assert found["cache"] == os.environ["NANOGPT_ENV_CACHE"]
    sandboxes = found["sandboxes"]["sandboxes"]
    assert not sandboxes["plain"]["trusted"] and not sandboxes["plain"]["reason"]
    assert set(found["checks"]) == {name for name, box in sandboxes.items() if box["available"]}
    assert all(report["ok"] for report in found["checks"].values())
    open_checks = [c["name"] for c in found["checks"]["plain"]["checks"] if c["outcome"] == "open"]
    assert "read" in open_checks and not [c for c in found["checks"]["bubblewrap"]["checks"] if c["outcome"] != "held"]
    assert set(builtin_tiers()) <= set(found["tiers"])
    text = call("doctor", "--no-check").stdout
    assert found["torch"] in text and "sandbox auto" in text and "warm starts" in text
    assert found["sandboxes"]["warm_starts"]["available"] is True
    assert found["slots"] == [] and "all cores free" in text


def test_doctor_tells_who_holds_a_core():
    with Slots("somebody").acquire() as slot:
        row = {"core": slot.core, "owner": "somebody", "pid": os.getpid(), "exclusive": False}
        assert call_json("doctor", "--no-check")["slots"] == [row]
        assert f"core {slot.core}" in (text := call("doctor", "--no-check").stdout) and "somebody" in text


def test_tiers_list():
    found = call_json("tiers", "list")
    assert found["unusable"] == []
    rows = {row["tier"]: row for row in found["tiers"]}
    assert set(builtin_tiers()) <= set(rows)
    for row in rows.values():
        assert row["start"]["value"] > row["anchor"]["value"] > 0
        assert row["start_flops"] > 1e9
        assert row["track"] == row["tier"].split("-")[-1].replace("bench", "wallclock")
    text = call("tiers", "list").stdout
    assert all(name in text for name in builtin_tiers())


def test_tiers_show():
    found = call_json("tiers", "show", TINY)
    assert found["tier"] == "tiny-steps"
    assert found["track"] == "steps"
    assert found["start"] == {"record": "slow", "value": TIER.value_of("slow")}
    flops = TIER.value_of("slow") * TIER.tokens_per_step() * TIER.flops_per_token()
    assert found["start_flops"] == pytest.approx(flops)
    assert found["settings"]["training"]["target"] == TIER.table.training.target
    assert found["calibration"]["sigma"] == TIER.measured.sigma
    assert "evidence" not in found["calibration"]
    text = call("tiers", "show", TINY).stdout
    assert "AdamW, cooldown" in text and f"target {TIER.table.training.target:g}" in text


def test_a_tier_that_is_not_calibrated_says_what_to_do(tmp_path):
    shutil.copytree(TINY, tmp_path / "tier")
    (tmp_path / "tier" / "calibration.json").unlink()
    refused(call("tiers", "show", tmp_path / "tier"), "nanogpt-env tiers calibrate")


def test_new_makes_what_run_accepts(tmp_path):
    folder = tmp_path / "made"
    assert call_json("new", folder, "--tier", TINY) == {"folder": str(folder), "files": ["optimizer.py", "task.md"]}
    assert (folder / "optimizer.py").read_text() == TIER.records["slow"].sources["optimizer.py"]
    assert (folder / "task.md").read_text() == TIER.task
    found = call_json("run", folder, "--tier", TINY, "--horizon", 40, "--steps", 12, "--seed", 1)
    assert set(found) == {"tier", "handle", "done", "horizon", "seed", "mfu", *RunResult.model_fields}
    assert (found["exit_reason"], found["steps"], found["seed"]) == ("completed", 12, 1)
    text = call("new", tmp_path / "other", "--tier", TINY).stdout
    assert f"nanogpt-env run {tmp_path / 'other'}" in text


def test_new_takes_any_record_also_of_a_tier_that_is_not_calibrated(tmp_path):
    tier = copy_tier(tmp_path, calibrated=False)
    assert call("new", tmp_path / "made", "--tier", tier, "--record", "muon").returncode == 0
    muon = (tier / "records" / "muon" / "optimizer.py").read_text()
    assert (tmp_path / "made" / "optimizer.py").read_text() == muon
    refused(call("new", tmp_path / "other", "--tier", tier, "--record", "genius"), "no record 'genius'")


def test_the_version_and_the_bare_command():
    assert call("--version").stdout.strip() == nanogpt_env.__version__
    bare = call()
    assert "Usage" in bare.stdout + bare.stderr
    assert "nanogpt-env: " not in bare.stderr


# --- what trains ---


def test_a_run_of_a_broken_rule_is_code_1(candidate):
    folder = candidate("def configure(params, horizon):\n    raise ValueError('boo')\n")
    done = call("run", folder, "--tier", TINY, "--horizon", 20)
    assert done.returncode == 1
    assert "candidate_error" in done.stdout and "boo" in done.stdout


def test_an_accepted_submission_is_code_0_and_its_ledger_agrees(candidate):
    arguments = ["--tier", TINY, "--claim", CLAIM, "--horizon", FAST.horizon]
    found = call_json("submit", candidate(), *arguments)
    assert set(found) == {*Verdict.model_fields, "reward", "recovered", "ledger"}
    assert (found["accepted"], found["claim"], found["value"], found["time"]) == (True, CLAIM, CLAIM, None)
    assert found["reward"] == found["recovered"] > 0.8
    replayed = call_json("replay", found["ledger"])
    assert replayed["differences"] == []
    assert replayed["total_reward"] == pytest.approx(found["reward"])
    assert "submission-1" in call("replay", found["ledger"]).stdout

    path = Path(found["ledger"])
    text = path.read_text()
    changed = text.replace(f'"best": {CLAIM}.0', '"best": 1.0')
    assert changed != text
    path.write_text(changed)
    done = call("replay", path)
    assert done.returncode == 1
    assert "recomputed" in done.stdout


def test_a_rejected_submission_is_code_1(candidate):
    done = call("submit", candidate(), "--tier", TINY, "--claim", 20, "--horizon", FAST.horizon)
    assert done.returncode == 1
    assert "rejected" in done.stdout and "ledger: " in done.stdout
    assert "rerun 1: completed" in done.stderr


def test_without_a_claim_a_few_runs_make_one(candidate):
    done = call("submit", candidate(), "--tier", TINY, "--horizon", 80, "--json")
    found = json.loads(done.stdout)
    assert "running the candidate at horizon 80" in done.stderr
    assert found["claim"] < 80
    assert done.returncode == (0 if found["accepted"] else 1)


def test_play_and_replay(tmp_path):
    output = tmp_path / "played"
    found = call_json("play", "--tier", TINY, "--agent", "ladder", "--output", output)
    assert [v["accepted"] for v in found["verdicts"]] == [False, True]  # it claims too much once
    assert all(v["trusted"] for v in found["verdicts"])
    assert found["recovered"] >= 0.8
    assert (found["best"], found["unit"]) == (found["verdicts"][1]["value"], "steps")
    assert found["total_reward"] == pytest.approx(found["recovered"])
    assert json.loads((output / "summary.json").read_text()) == found
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    assert Path(found["picture"]).parent == output
    assert output in Path(found["ledger"]).parents
    replayed = call_json("replay", found["ledger"])
    assert replayed["differences"] == []
    assert replayed["total_reward"] == pytest.approx(found["total_reward"])
    assert [s["accepted"] for s in replayed["submissions"]] == [False, True]


# --- attacks and images ---


def test_attack_prints_what_became_of_each():
    found = call_json("attack", "--sandbox", "bubblewrap", "--only", "prints_at_exit", "--naive")
    assert found["ok"] and found["sandbox"] == "bubblewrap"
    assert {(o["case"], o["verdict"]) for o in found["outcomes"]} == {
        ("steps/a01_prints_at_exit", "no effect"),
        ("wallclock/a01_prints_at_exit", "no effect"),
    }
    assert all("loss 1.000" in o["naive"] for o in found["outcomes"])


def test_an_attack_that_gets_through_is_said_and_an_exit_code():
    done = call("attack", "--sandbox", "plain", "--only", "steps/f46_reads")
    assert done.returncode == 1 and "PASSED THROUGH" in done.stdout


def test_attack_without_a_case_is_misuse():
    done = call("attack", "--only", "nothing of this name")
    assert done.returncode == 2 and "no case has" in done.stderr


def test_an_image_needs_an_engine():
    done = call("image", env={**os.environ, "DOCKER_HOST": "unix:///nowhere"})
    assert done.returncode == 3 and "no Docker daemon at /nowhere" in done.stderr


def test_records_are_listed_shown_and_drawn(tmp_path):
    listed = call_json("records", "list")["records"]
    assert len(listed) == 20 and listed[-1]["number"] == 46
    assert [r["number"] for r in listed if not r["judged_again"]["passes"]] == [1, 3]
    assert len(call_json("records", "list", "--track", "short", "--every", "--human-only")["records"]) == 86
    assert "Hiverge" in call("records", "list", "--track", "short").stdout
    assert call_json("records", "show", "before 2025-09-04", "--track", "short")["number"] == 29
    assert "2690" in call("records", "show", "latest").stdout
    assert call("records", "plot", tmp_path / "records.png").returncode == 0
    assert (tmp_path / "records.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("show", "0"), "1 to 46"),
        (("show", "now"), "before DATE"),
        (("list", "--track", "long"), "short, medium, optimization"),
        (("plot", "/no/x.png"), "/no/x.png"),
    ],
)
def test_a_record_that_there_is_not_is_refused(arguments, told):
    done = call("records", *arguments)
    assert done.returncode != 0 and told in done.stderr
