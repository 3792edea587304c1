"""The wheel: what is in it, and that it works away from the checkout. Needs no network."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import TINY

ROOT = Path(__file__).parents[1]
CONTENT = ("envs", "judges", "gpu_backend")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The wheel, installed."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--target", str(folder), str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def python(code, site, *arguments):
    """Run code in a fresh interpreter that finds `site` first, from a folder that has nothing of ours."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_only_the_package_is_at_the_top(names):
    tops = {name.split("/")[0] for name in names}
    assert "nanogpt_env" in tops and len(tops) == 2
    (other,) = tops - {"nanogpt_env"}
    assert other.startswith("nanogpt_env-") and other.endswith(".dist-info")


def test_what_users_copy_and_edit_is_in_it(names):
    shipped = {
        f"nanogpt_env/_content/{path.relative_to(ROOT).as_posix()}"
        for folder in CONTENT
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped <= names
    kinds = ["env.toml", "task.md", "record.toml", "optimizer.py", ".bin.xz", "judge.toml", "manifest.json"]
    assert all(any(name.endswith(kind) for name in shipped) for kind in kinds)
    assert {f"nanogpt_env/_content/gpu_backend/{name}.py" for name in ("trainer", "sandbox", "rule_host")} <= shipped


def test_every_tier_comes_with_its_calibration(names):
    tiers = {name.rsplit("/", 1)[0] for name in names if name.endswith("/env.toml")}
    built_in = {f"nanogpt_env/_content/envs/{path.parent.name}" for path in (ROOT / "envs").glob("*/env.toml")}
    assert tiers == built_in | {"nanogpt_env/_content/tiny-free"}  # which attacks on free models need
    assert {f"{tier}/calibration.json" for tier in tiers} <= names


def test_every_module_and_the_type_marker_are_in_it_and_nothing_else(names):
    package = {name for name in names if name.startswith("nanogpt_env/") and "/_content/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nanogpt_env").rglob("*.py")}
    records = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nanogpt_env" / "human_records").iterdir()}
    assert package == modules | records | {"nanogpt_env/py.typed"}
    assert not any(Path(name).name.startswith(("test_", "conftest")) for name in names if name.endswith(".py"))
    assert not any(part in name for name in names for part in ("__pycache__", "/tests/", "/docs/", ".git/"))


def test_licence_and_command_are_in_it(wheel, names):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        assert "nanogpt-env = nanogpt_env.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names


def test_installed_it_takes_its_content_from_itself(site):
    code = """
import nanogpt_env
from nanogpt_env.content import content_root
from nanogpt_env.judging.static import judge_source
from nanogpt_env.tiers import builtin_tiers, load_tier
print(nanogpt_env.__file__, content_root(), *builtin_tiers())
for name in builtin_tiers():
    tier = load_tier(name, calibrated=False)
    assert (tier.corpus_folder() / "manifest.json").is_file()
    for record in tier.records.values():
        assert not any(judge_source(text, name) for name, text in record.sources.items())
"""
    file, content, *tiers = python(code, site)
    assert file == str(site / "nanogpt_env" / "__init__.py")
    assert content == str(site / "nanogpt_env" / "_content")
    assert tiers == sorted(path.parent.name for path in (ROOT / "envs").glob("*/env.toml"))


def test_installed_it_trains(site, tmp_path):
    code = """
import sys
from nanogpt_env import Run, Speedrun
env = Speedrun(sys.argv[1], state_dir=sys.argv[2])
env.reset()
run = env.step(Run(horizon=4))[4]["run"]
env.close()
print(run["exit_reason"], run["steps"], run["sandbox"]["trusted"])
"""
    assert python(code, site, TINY, tmp_path) == ["completed", "4", "True"]


def test_a_package_gives_a_tier_its_name(tmp_path):
    site = tmp_path / "site"
    shutil.copytree(TINY, site / "their_tiers" / "quick")
    for folder in (site / "their_tiers", site / "their_tiers" / "quick"):
        (folder / "__init__.py").write_text("raise RuntimeError('a tier is data; it is not imported')\n")
    (site / "their_tiers" / "__init__.py").write_text("")
    info = site / "their_tiers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-tiers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[nanogpt_env.tiers]\ntheir-quick = their_tiers.quick\nnano-steps = their_tiers.quick\nlost = not_installed.x\n"
    )
    code = """
import gymnasium, sys
from nanogpt_env.tiers import builtin_tiers, find_tier, tier_folders
env = gymnasium.make("nanogpt_env:NanoGPT/Speedrun-v0", tier="their-quick", state_dir=sys.argv[1])
env.reset()
print(env.unwrapped.tier.folder, env.unwrapped.tier.name)
print(find_tier("nano-steps").parent.name)
print("lost" in tier_folders())
env.close()
"""
    folder, name, nano, lost = python(code, site, tmp_path / "state")
    assert folder == str(site / "their_tiers" / "quick")
    assert name == "tiny-steps"
    assert nano == "envs"  # a built-in name cannot be taken
    assert lost == "False"


def test_attacks_can_be_run_from_it(site):
    code = """
from nanogpt_env import attacks
cases = attacks.load_cases()
print(len(cases), next(case for case in cases if case.track == "free").load_tier().name, len(attacks.load_bounded()))
"""
    count, name, bounded = python(code, site)
    assert int(count) > 70 and name == "tiny-free" and int(bounded) > 3
