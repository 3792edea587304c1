"""Candidates in real containers, of a daemon that the tests start."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import docker
import pytest
from rules import SGD, rule_job, train
from test_timed import job_of
from toys import toy

from nanogpt_env import Speedrun, Submit, WriteFile
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.errors import BackendError
from nanogpt_env.testing import check_backend
from nanogpt_env.tiers import load_tier

import container
import owner
import trainer
from logs import BoundedLog

TINY = Path(__file__).parent / "tiny-wallclock"

pytestmark = pytest.mark.usefixtures("docker_engine")


@pytest.fixture
def client(docker_engine):
    with contextlib.closing(docker.DockerClient(base_url=docker_engine)) as client:
        yield client


@pytest.fixture(scope="module")
def boxed(docker_engine):
    backend = LocalBackend("docker")
    yield backend
    backend.close()


def test_it_conforms(boxed, client):
    report = check_backend(boxed)
    assert report.ok and all(check.outcome == "held" for check in report.checks), str(report)
    assert report.sandbox.name == "docker" and report.sandbox.trusted
    assert client.containers.list(all=True) == []


def test_results_name_engine_and_image(boxed, tier, client):
    result = train(boxed, tier, SGD, steps=2)
    assert result.completed
    version = client.version()["Version"]
    assert result.sandbox.version == f"{version}, image host {client.images.get('nanogpt_env').id}"


def test_losses_are_those_of_other_sandboxes(boxed, tier):
    with contextlib.closing(LocalBackend("plain")) as plain:
        assert train(boxed, tier, SGD, steps=6).train_losses == train(plain, tier, SGD, steps=6).train_losses


def test_a_nano_verification(docker_engine, tmp_path):
    """The anchor of nano-steps, with room, is accepted on its word by runs in containers."""
    tier = load_tier("nano-steps")
    record = tier.record(tier.table.valued[-1])
    claim = tier.measured.records[record.name].claim
    env = Speedrun("nano-steps", sandbox="docker", state_dir=tmp_path)
    try:
        env.reset()
        env.step(WriteFile(path="optimizer.py", text=record.sources["optimizer.py"]))
        *_, info = env.step(Submit(claim=claim + 8, horizon=claim + 8))
        assert info["verdict"]["accepted"], info["verdict"]
        assert info["verdict"]["trusted"]
    finally:
        env.close()


def test_gpus_that_the_engine_cannot_give_are_refused(boxed, tier, client):
    job = rule_job(tier, SGD, 2).model_copy(update={"gpus": 1, "gpu_ids": ("0",)})
    with pytest.raises(BackendError, match=r"no container could be started: .*gpu"):
        boxed.start(job).result(120)
    assert client.containers.list(all=True) == []


def test_two_ranks_are_two_containers_and_one_result(boxed, tier):
    job = rule_job(tier, SGD, 4).model_copy(update={"shards": 2})
    alone = boxed.start(job).result(120)
    both = boxed.start(job.model_copy(update={"ranks": 2})).result(120)
    assert both.completed, both.detail
    assert both.train_losses == pytest.approx(alone.train_losses, abs=1e-5)


def test_auto_takes_it_where_there_is_an_image(docker_engine):
    assert LocalBackend("auto").kind() == "docker"


def test_containers_of_dead_owners_are_removed(boxed, tier, client):
    dead = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    name = owner.name(dead.pid)
    image = client.images.get("nanogpt_env")
    options = container.settings(image, [], "/tmp", ["filter"]) | {"labels": {container.OWNER_LABEL: name}}
    options["command"] = [sys.executable, "-I", "-c", "import time; time.sleep(600)"]
    left = client.containers.run(image.id, **options)
    train(boxed, tier, SGD, steps=1)
    assert client.containers.get(left.id).status == "running", "its owner is alive"
    dead.kill()
    dead.wait()
    train(boxed, tier, SGD, steps=1)
    assert client.containers.list(all=True) == []


def test_a_killed_trainer_leaves_a_container_only_until_the_next_run(boxed, tier, client):
    """The candidate ignores that its line ends."""
    backend = LocalBackend("docker")
    source = f"import time\ntime.sleep(600)\n{SGD}"
    job = tier.job({"optimizer.py": source}, tier.plan(2, 2), "1", ("val_public",))
    run = backend.start(job)
    until = time.monotonic() + 60
    while not client.containers.list() and time.monotonic() < until:
        time.sleep(0.1)
    run._process.kill()
    with pytest.raises(BackendError):
        run.result(60)
    backend.close()
    assert train(boxed, tier, SGD, steps=1).completed
    assert client.containers.list(all=True) == []


def test_the_container_is_as_strict_as_we_say(client):
    found = container.settings(client.images.get("nanogpt_env"), [], "/tmp", ["filter"], gpus=("0",))
    wanted = {"network_mode": "none", "read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]}
    assert wanted.items() <= found.items() and found["user"] == "65534:65534"
    assert all(mount["ReadOnly"] for mount in found["mounts"])
    assert found["device_requests"][0]["DeviceIDs"] == ["0"]
    assert not {"privileged", "pid_mode", "ipc_mode", "devices", "cap_add"} & set(found)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tcp://192.0.2.1:2375", "another machine's"),
        ("unix:///nowhere/docker.sock", "no Docker daemon at /nowhere"),
        ("ssh://me@192.0.2.1", "another machine's"),
    ],
)
def test_a_daemon_that_cannot_be_had_is_said(monkeypatch, address, says):
    monkeypatch.setenv("DOCKER_HOST", address)
    assert says in container.unavailable()


def test_something_else_behind_the_socket_is_said(monkeypatch, tmp_path):
    import socket

    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/s")
        assert "does not answer" in container.unavailable()


def test_without_an_image_the_way_to_one_is_said(client, docker_engine):
    client.images.remove("nanogpt_env", force=True)
    try:
        assert "nanogpt-env image" in container.unavailable()
        with pytest.raises(BackendError, match="nanogpt-env image"), contextlib.closing(LocalBackend("docker")) as one:
            train(one, load_tier("nano-steps"), SGD, steps=1)
    finally:
        container.build("host")
    assert Path(docker_engine.removeprefix("unix://")).exists()


# --- as with GPUs, which are not here: everything but the devices ---

PROCESSES = """
import ctypes, errno, os, socket, subprocess, sys
print("exec", subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout.strip())
listener = socket.create_server(("127.0.0.1", 0))
print("loopback", socket.create_connection(listener.getsockname()).getpeername()[0])
def refused(name, act):
    try:
        found = act()
    except OSError as error:
        found = errno.errorcode.get(error.errno, str(error))
    print(name, found)
refused("outside", lambda: socket.create_connection(("192.0.2.1", 80), 2))
refused("raw", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
libc = ctypes.CDLL(None, use_errno=True)
for name, flag in (("user", 0x10000000), ("pid", 0x20000000), ("net", 0x40000000)):
    libc.unshare(flag)
    print(name, errno.errorcode[ctypes.get_errno()])
    pid = libc.syscall(56, flag | 17, 0, 0, 0, 0)
    print("clone", name, errno.errorcode[ctypes.get_errno()] if pid < 0 else "made")
open("/tmp/x.so", "w").close()
print("files", __import__("resource").getrlimit(7)[0] > 1000)
if os.fork() == 0:
    os.setsid()
    __import__("time").sleep(600)
raise SystemExit
"""


@pytest.fixture
def as_with_gpus(monkeypatch, docker_engine):
    """Launch a host script as for a run with a GPU, but without asking the engine for one."""
    settings = container.settings
    monkeypatch.setattr(container, "settings", lambda *args: settings(*args) | {"device_requests": []})

    def launch(log_fd, host):
        return container.launch([], log_fd, host, "", ("0",))

    return launch


def timed_run(launch, job):
    log = BoundedLog()
    process = launch(log.write_fd, "train_host.py")
    log.close_writer()
    try:
        process.wait_loaded()
        cancel = trainer.Cancel(process)
        return trainer.run(trainer.WallclockJob(**job.model_dump()), process, log, cancel, launch)
    finally:
        process.kill()
        process.close()


def test_with_gpus_a_candidate_has_processes_and_nothing_more_to_reach(as_with_gpus, client):
    result = timed_run(as_with_gpus, job_of(load_tier(TINY), PROCESSES))
    assert result.exit_reason == "candidate_error"
    told = dict(line.rsplit(" ", 1) for line in result.log.splitlines() if line.count(" ") in (1, 2))
    assert told["exec"] == "42" and told["loopback"] == "127.0.0.1" and told["files"] == "True"
    assert told["outside"] in ("ENETUNREACH", "EPERM")
    assert {told[name] for name in ("raw", "user", "pid", "net", "clone user", "clone pid", "clone net")} == {"EPERM"}
    assert client.containers.list(all=True) == []  # with what it started


def test_two_ranks_in_one_container_give_what_one_gives(as_with_gpus, tmp_path, monkeypatch):
    tier = toy(tmp_path / "toy", "small-wallclock", monkeypatch, tokens=2048 * 6)
    sources, losses = tier.record("modern").sources, []
    for count in (1, 2):
        text = sources["train.py"].replace("max(1, torch.cuda.device_count())", str(count))
        result = timed_run(as_with_gpus, tier.job({**sources, "train.py": text}, None, "1", ("val_hidden",)))
        assert result.exit_reason == "completed", result.detail + result.log
        losses.append(result.val_losses["val_hidden"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
