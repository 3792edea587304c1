"""Shared fixtures. Tests never touch the user's cache and state folders."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import engine
import pytest
from fakes import FakeBackend

from nanogpt_env import Speedrun
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.content import content_root
from nanogpt_env.tiers import load_tier

import container

TINY = Path(__file__).parent / "tiny-steps"
LONG = ["docs", "attacks", "gpu_tiers", "docker", "train_rl", "ranks", "search_agents", "wallclock", "mcp"]


def pytest_collection_modifyitems(items):
    """Files that take minutes come first: in the end one worker would be alone with the last of them."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory):
    """Caches and ledgers of the test session lie in a folder of its own, subprocesses' too."""
    folder = tmp_path_factory.mktemp("nanogpt_env")
    saved = dict(os.environ)
    # a shell's background jobs ignore Ctrl-C, and so would all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"NANOGPT_ENV_CACHE": str(folder / "cache"), "NANOGPT_ENV_STATE": str(folder / "state")}
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def make(tmp_path):
    """Environments on tiny-steps and a scripted backend, reset and ready."""
    made = []

    def make(backend=None, tier=TINY, **options):
        env = Speedrun(tier, backend=backend or FakeBackend(), state_dir=tmp_path / "state", **options)
        made.append(env)
        env.reset()
        return env

    yield make
    for env in made:
        env.close()


@pytest.fixture(scope="module")
def tier():
    return load_tier(TINY)


@pytest.fixture(scope="module", params=["bubblewrap", "plain"])
def backend(request):
    """What trains for real, in every sandbox."""
    backend = LocalBackend(request.param, warm=True)
    backend.prepare()
    if backend._server:
        backend._server.wait()  # what it starts once and keeps is there now
        assert backend._server.reason == ""
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def sealed():
    backend = LocalBackend("bubblewrap", warm=True)
    yield backend
    backend.close()


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Changes our trainer for one test: (file, old text, new text)."""
    root = tmp_path / "root"
    shutil.copytree(content_root() / "gpu_backend", root / "gpu_backend")
    monkeypatch.setattr("nanogpt_env.backends.trainers.content_root", lambda: root)
    monkeypatch.setattr("nanogpt_env.backends.local.content_root", lambda: root)  # its report

    def change(file, old, new):
        path = root / "gpu_backend" / file
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.fixture(scope="session")
def _docker_address(tmp_path_factory):
    """Of a Docker daemon with the image in which this machine's Python is mounted."""
    if why := engine.missing():
        assert engine.REQUIRED not in os.environ, why
        pytest.skip(why)
    with engine.running(tmp_path_factory.mktemp("docker")) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", address)
        container.build("host")
        patch.undo()
        yield address


@pytest.fixture(scope="module")
def docker_engine(_docker_address):
    """Its address. The tests of the module see it, by DOCKER_HOST; for others 'auto' must not become docker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", _docker_address)
        yield _docker_address
