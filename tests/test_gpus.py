"""GPUs for runs: whole ones, each to one run at a time, refused when somebody else uses them. There is none here, so
the driver's program is played by a script of ours."""

import contextlib
import os
import threading
import time
from concurrent.futures import CancelledError

import pytest
from fakes import FakeBackend
from rules import SGD, rule_job

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.backends.queued import Queued
from nanogpt_env.errors import BackendError
from nanogpt_env.gpus import Gpus, usable_gpus


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Writes what `nvidia-smi` answers about GPUs and about processes."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def answer(gpus, processes=""):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncase $1 in *gpu=*) printf '{gpus}' ;; *) printf '{processes}' ;; esac\n")
        script.chmod(0o755)

    return answer


def test_which_there_are(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 3")
    assert usable_gpus() == ["0", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert usable_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver("0, GPU-aa\\n1, GPU-bb\\n")
    assert usable_gpus() == ["GPU-aa", "GPU-bb"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert usable_gpus() == ["GPU-bb"]


def test_no_driver_no_gpus(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert usable_gpus() == []
    gpus = Gpus("me", folder=tmp_path)
    with pytest.raises(BackendError, match=r"takes 1 GPU\(s\) and this host offers 0"), gpus.acquire(1):
        pass
    with gpus.acquire(0) as none:
        assert none == ()


def test_no_two_holders_have_one_in_common_and_nobody_waits_for_ever(tmp_path):
    held, most, problems, guard = set(), [0], [], threading.Lock()

    def use(i):
        owner = Gpus(f"owner-{i}", ["a", "b", "c", "d"], tmp_path)
        for count in (1, 3, 2, 4):
            with owner.acquire(count) as mine:
                with guard:
                    problems.extend(held & set(mine))
                    held.update(mine)
                    most[0] = max(most[0], len(held))
                time.sleep(0.02)
                with guard:
                    held.difference_update(mine)
                assert len(set(mine)) == count

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert problems == []
    assert most[0] == 4


def test_a_wait_can_be_cancelled(tmp_path):
    first, second = (Gpus(name, ["a"], tmp_path) for name in "12")
    began = time.monotonic()
    with first.acquire(1), pytest.raises(CancelledError), second.acquire(1, lambda: time.monotonic() > began + 0.5):
        pass
    with second.acquire(1) as mine:
        assert mine == ("a",)


def test_a_busy_one_is_refused_with_who_is_on_it(driver, tmp_path, monkeypatch):
    driver("0, GPU-aa\\n1, GPU-bb\\n", "GPU-bb, 4711, python\\n")
    gpus = Gpus("me", folder=tmp_path)
    with gpus.acquire(1) as mine:
        assert mine == ("GPU-aa",)
    with pytest.raises(BackendError, match="GPU-bb, 4711, python"), gpus.acquire(2):
        pass
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # by number, while the driver names processes by identifier
    with pytest.raises(BackendError, match="GPU-bb, 4711, python"), Gpus("other", folder=tmp_path / "2").acquire(1):
        pass
    driver("0, GPU-aa\\n1, GPU-bb\\n")
    with gpus.acquire(2):  # nothing was kept
        pass


@pytest.mark.parametrize("exclusive", [False, True])
def test_runs_get_theirs_and_give_them_back(tier, monkeypatch, exclusive):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    given = []

    def script(job, number):
        given.append(job.gpu_ids)
        raise BackendError("enough")

    job = rule_job(tier, SGD, 4).model_copy(update={"gpus": 2})
    backend = Queued(FakeBackend(script), "me")
    with contextlib.closing(backend), backend.exclusive() if exclusive else contextlib.nullcontext():
        for _ in range(2):
            with pytest.raises(BackendError, match="enough"):
                backend.start(job).result(10)
    assert given == [("0", "1")] * 2


def test_only_containers_are_given_gpus(tier):
    job = rule_job(tier, SGD, 4).model_copy(update={"gpus": 1, "gpu_ids": ("0",)})
    with contextlib.closing(LocalBackend("bubblewrap")) as backend:
        run = backend.start(job)
        with pytest.raises(BackendError, match="containers only"):
            run.result(60)
