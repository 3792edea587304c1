"""Candidates in containers of Docker, or of what speaks its protocol. The daemon must run on this machine, as candidate
and trainer share memory. See docs/sandboxes.md.

The image is one that was built with `nanogpt-env image`; the scripts of ours that run in it are mounted from here. A
container is labelled with its owner, so that those of a killed trainer are found and removed by the next (`reap`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import select
import signal
import socket
import struct
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import confine
import owner
import visible
from cgroups import LIBRARY_BYTES
from process import (
    ENVIRONMENT,
    HERE,
    HOST_FILES,
    INSIDE,
    KILL_TIMEOUT_S,
    MAX_THREADS,
    SCRATCH_BYTES,
    Process,
    SandboxError,
    SandboxInfo,
)

IMAGE = "nanogpt_env"
VARIANTS = ("host", "cpu", "cuda")
OWNER_LABEL, VARIANT_LABEL = "nanogpt_env.owner", "nanogpt_env.variant"
FILES = (*HOST_FILES, "restrict.py", "seccomp.py")
START_TIMEOUT_S = 60.0
# with GPUs: what torch.compile writes and maps as code, and the processes of its compilers and of data parallelism
GPU_SCRATCH_BYTES, GPU_PROCESSES = 4 << 30, 2048
NOBODY = 65534
_LINE = "/line"
_DEFAULT_HOST = "unix:///var/run/docker.sock"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass
class Contained(Process):
    """The host script is the first process of its container: with it all others end."""

    container: Any
    pidfd: int
    folder: tempfile.TemporaryDirectory[str]
    has_gpus: bool

    def address_space(self, memory_bytes: int) -> int:
        # CUDA reserves far more addresses than a machine has memory; the container's limit counts what is used
        return 0 if self.has_gpus else memory_bytes

    def limit(self, memory_bytes: int) -> None:
        total = memory_bytes + LIBRARY_BYTES
        self.container.update(mem_limit=total, memswap_limit=total)

    def thread_limit(self) -> int:
        return 0  # the container's own limit counts

    def out_of_memory(self) -> bool:
        with contextlib.suppress(Exception):  # whatever the SDK raises
            self.container.reload()
            return bool(self.container.attrs["State"]["OOMKilled"])
        return False

    def pin(self, cores: list[int]) -> None:
        if cores:
            self.container.update(cpuset_cpus=",".join(map(str, cores)))

    def stop(self) -> None:
        try:
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:  # a member of the daemon's group is not the candidate's user
            with contextlib.suppress(Exception):  # it may have ended meanwhile
                self.container.kill()

    def kill(self) -> None:
        self.stop()
        if self.pidfd >= 0 and not select.select([self.pidfd], [], [], KILL_TIMEOUT_S)[0]:
            raise TimeoutError(f"the candidate's container did not end within {KILL_TIMEOUT_S:g} s")
        self.control.close()

    def close(self) -> None:
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)
            _remove(self.container)
            self.container.client.close()
            self.folder.cleanup()


def unavailable() -> str:
    """Why candidates cannot be put into containers here; '' if they can."""
    try:
        with _client() as client:
            _image(client)
    except SandboxError as error:
        return str(error)
    return ""


def launch(hidden: list[Path], log_fd: int, host: str, note: str, gpus: tuple[str, ...] = ()) -> Contained:
    """Raises `SandboxError`."""
    client = _connect()
    image = _image(client)
    reap(client)
    folder = tempfile.TemporaryDirectory(prefix="nanogpt_env-")  # which others may not enter
    container = None
    try:
        with _listen(Path(folder.name)) as listener:
            command = ["filter", host, f"{_LINE}/trainer", *(["--processes"] if gpus else [])]
            container = client.containers.create(image.id, **settings(image, hidden, folder.name, command, gpus))
            container.start()  # apart: one that does not start is to be removed, too
            pid, pidfd = _process(container)
            control = _accept(listener, container, pid)
        _tell(control, log_fd, image)
    except BaseException as error:
        if container is not None:
            _remove(container)
        folder.cleanup()
        if isinstance(error, Exception) and not isinstance(error, SandboxError):
            raise SandboxError(f"no container could be started: {error}") from None
        raise
    version = client.version()["Version"]
    info = SandboxInfo("docker", f"{version}, image {image.labels[VARIANT_LABEL]} {image.id}", True, note)
    return Contained(info, pid, control, container, pidfd, folder, bool(gpus))


def settings(
    image: Any, hidden: list[Path], folder: str, command: list[str], gpus: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What the container is made with. `folder` has our end of the line, `gpus` are devices by number or name."""
    types = importlib.import_module("docker.types")
    own_python = image.labels[VARIANT_LABEL] == "host"
    binds = {str(HERE / file): f"{INSIDE}/{file}" for file in FILES} | {folder: _LINE}
    room = f"size={GPU_SCRATCH_BYTES},exec" if gpus else f"size={SCRATCH_BYTES},nr_inodes={confine.INODES}"
    scratch = {"/tmp": f"{room},mode=1777"}
    if own_python:
        shown = [*visible.roots(), *visible.packages()]
        binds |= {str(path): str(path) for path in shown if not visible.is_link(path)}
        scratch |= {str(path): "ro,size=64k,mode=755" for path in visible.covered(hidden)}
    python = sys.executable if own_python else "python3"
    return {
        "command": [python, "-I", "-B", "-u", f"{INSIDE}/restrict.py", *command],
        "detach": True,
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "user": f"{NOBODY}:{NOBODY}",
        "pids_limit": GPU_PROCESSES if gpus else MAX_THREADS,
        "shm_size": GPU_SCRATCH_BYTES if gpus else SCRATCH_BYTES,
        "tmpfs": scratch,
        "mounts": [types.Mount(target, source, "bind", read_only=True) for source, target in binds.items()],
        "environment": ENVIRONMENT,
        "working_dir": "/tmp",
        "hostname": "sandbox",
        "labels": {OWNER_LABEL: owner.name()},
        "log_config": types.LogConfig(type="json-file", config={"max-size": "64k", "max-file": "1"}),
        "ulimits": [types.Ulimit(name="core", soft=0, hard=0)],
        "device_requests": [types.DeviceRequest(device_ids=list(gpus), capabilities=[["gpu"]])] if gpus else [],
    }


def reap(client: Any) -> int:
    """Remove the containers of owners that are dead; how many there were."""
    count = 0
    for container in client.containers.list(all=True, filters={"label": OWNER_LABEL}):
        if owner.is_dead(container.labels[OWNER_LABEL]):
            _remove(container)
            count += 1
    return count


def build(variant: str, base: str = "", pip_options: str = "", on_line: Any = print) -> str:
    """Make the image, and its id. 'host': an empty one into which this machine's Python is mounted; 'cpu' and 'cuda':
    from the Dockerfile, `base` and `pip_options` replace its arguments. Raises `SandboxError`."""
    with _client() as client:
        if variant == "host":
            client.api.import_image_from_data(
                _skeleton(), repository=IMAGE, tag="latest", changes=[f"LABEL {VARIANT_LABEL}={variant}"]
            )
        else:
            arguments = {name: value for name, value in (("BASE", base), ("PIP_OPTIONS", pip_options)) if value}
            steps = client.api.build(
                path=str(HERE), dockerfile="Dockerfile", tag=IMAGE, buildargs=arguments, decode=True, rm=True,
                labels={VARIANT_LABEL: variant}, network_mode="host",
            )  # fmt: skip
            for step in steps:
                if "error" in step:
                    raise SandboxError(f"the image could not be built: {step['error'].strip()}")
                if text := step.get("stream", "").strip():
                    on_line(text)
        return str(_image(client).id)


def _skeleton() -> bytes:
    """A tar of the folders that mounts need, and of the links that /usr has to itself."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("dev", "etc", "line", "proc", "sys", "tmp", "trainer", "usr"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(entry)
        for path in filter(visible.is_link, visible.roots()):
            entry = tarfile.TarInfo(path.name)
            entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
            tar.addfile(entry)
        passwd = f"nobody:x:{NOBODY}:{NOBODY}:nobody:/tmp:/usr/sbin/nologin\n".encode()
        entry = tarfile.TarInfo("etc/passwd")
        entry.size = len(passwd)
        tar.addfile(entry, io.BytesIO(passwd))
    return buffer.getvalue()


def _connect() -> Any:
    """A client. Raises `SandboxError` with the way out."""
    address = os.environ.get("DOCKER_HOST", _DEFAULT_HOST)
    if not address.startswith("unix://"):
        raise SandboxError(
            f"the daemon at {address} is another machine's, and candidates share memory with the trainer"
        )
    path = address.removeprefix("unix://")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except FileNotFoundError:
        raise SandboxError(f"there is no Docker daemon at {path} (DOCKER_HOST says where it is)") from None
    except PermissionError:
        raise SandboxError(f"this user may not speak to the Docker daemon at {path}: is it in its group?") from None
    except OSError as error:
        raise SandboxError(f"the Docker daemon at {path} does not answer: {error}") from None
    try:
        docker = importlib.import_module("docker")  # takes long; most hosts have no daemon to ask for
    except ImportError:
        raise SandboxError("the `docker` package is not installed: `pip install 'nanogpt_env[docker]'`") from None
    try:
        return docker.DockerClient(base_url=address, timeout=START_TIMEOUT_S)  # it asks for the daemon's version
    except docker.errors.DockerException as error:
        raise SandboxError(f"the Docker daemon at {path} does not answer: {error}") from None


@contextlib.contextmanager
def _client() -> Iterator[Any]:
    client = _connect()
    try:
        yield client
    finally:
        client.close()


def _image(client: Any) -> Any:
    found = client.images.list(name=IMAGE, filters={"label": VARIANT_LABEL})
    if not found:
        raise SandboxError("there is no image to run candidates in: `nanogpt-env image`")
    return found[0]


@contextlib.contextmanager
def _listen(folder: Path) -> Iterator[socket.socket]:
    """For one connection from inside; the mount of the folder itself is not stopped by who may enter those above."""
    os.chmod(folder, 0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(folder / "trainer"))
        os.chmod(folder / "trainer", 0o666)
        listener.listen(1)
        yield listener
    os.unlink(folder / "trainer")


def _process(container: Any) -> tuple[int, int]:
    """Number and pidfd of the container's first process."""
    container.reload()
    pid = int(container.attrs["State"]["Pid"])
    if not pid:
        raise SandboxError(f"the container ended at once: {_output(container)}")
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        raise SandboxError(f"the container's process is not to be seen from here: {_output(container)}") from None


def _accept(listener: socket.socket, container: Any, pid: int) -> socket.socket:
    listener.settimeout(1.0)
    for _ in range(int(START_TIMEOUT_S)):
        try:
            control, _ = listener.accept()
        except TimeoutError:
            container.reload()
            if container.status != "running":
                break
            continue
        peer = _CREDENTIALS.unpack(control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if peer[0] == pid:
            return control
        control.close()
        raise SandboxError("somebody else took the container's line")
    raise SandboxError(f"the container's process does not report: {_output(container)}")


def _tell(control: socket.socket, log_fd: int, image: Any) -> None:
    """Where to print; and check what interpreter it is that answers."""
    socket.send_fds(control, [b"!"], [log_fd])
    control.settimeout(START_TIMEOUT_S)
    told = b""
    while not told.endswith(b"\n") and (byte := control.recv(1)):
        told += byte
    found = json.loads(told or "{}")
    wanted = {"python": sys.version, "prefix": sys.prefix, "torch": importlib.metadata.version("torch")}
    if image.labels[VARIANT_LABEL] == "host" and found != wanted:
        raise SandboxError(f"the container has another interpreter: {found} instead of {wanted}")
    if not found.get("torch"):
        raise SandboxError(f"the container's Python has no torch: {found}")


def _output(container: Any) -> str:
    with contextlib.suppress(Exception):  # it may be gone
        return str(container.logs(tail=20).decode("utf-8", "replace").strip()[-500:])
    return "no output"


def _remove(container: Any) -> None:
    with contextlib.suppress(Exception):  # already gone, or being removed
        container.remove(force=True)


def main() -> int:
    """Build the image from the command line: `python container.py VARIANT`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--base", default="")
    parser.add_argument("--pip-options", default="")
    args = parser.parse_args()
    try:
        print(build(args.variant, args.base, args.pip_options))
    except SandboxError as error:
        print(f"nanogpt-env image: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
