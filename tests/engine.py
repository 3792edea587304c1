"""A Docker daemon of the tests' own: its images, containers and socket lie in a folder that goes with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import host

REQUIRED = "NANOGPT_ENV_NEEDS_DOCKER"  # set where a missing engine is a failure: in CI


def missing():
    """Why no daemon can be started here; '' if one can."""
    if not shutil.which("dockerd"):
        return "there is no `dockerd` (Debian: `apt-get install docker.io`)"
    return "" if os.geteuid() == 0 else "starting a Docker daemon needs root"


@contextlib.contextmanager
def running(folder: Path):
    """Its address. No registry, no bridge, no firewall rules are needed."""
    address = f"unix://{folder}/docker.sock"
    command = ["dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs",
               "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid",
               "-H", address]  # fmt: skip
    with (folder / "log").open("wb") as log:
        # it ends with the tests, even if those are killed
        daemon = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=host.die_with_parent)
    try:
        until = time.monotonic() + 60
        while not (folder / "docker.sock").exists() or not _answers(address):
            assert daemon.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield address
    finally:
        daemon.terminate()
        daemon.wait(30)
        for group in Path("/sys/fs/cgroup").glob("**/docker"):  # empty ones, that it leaves behind
            with contextlib.suppress(OSError):
                group.rmdir()


def _answers(address):
    import docker

    try:
        with contextlib.closing(docker.DockerClient(base_url=address, timeout=2)) as client:
            return client.ping()
    except Exception:  # the SDK's and requests' own
        return False
