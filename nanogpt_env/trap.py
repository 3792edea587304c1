"""What a candidate must not reach, set up on this host and watched from outside: for conformance checks and attacks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt_env import content

EFFECTS = {
    "tcp": "a socket on this host was reached",
    "udp": "a socket on this host was reached",
    "tcp6": "a socket on this host was reached",
    "udp6": "a socket on this host was reached",
    "abstract socket": "a socket on this host was reached",
    "named socket": "a socket on this host was reached",
    "named datagram socket": "a socket on this host was reached",
    "route": "there is a route to other machines",
    "write": "files of this host were written",
    "change": "mode, date or size of a file was changed",
    "read": "a file of this host was read",
    "content": "validation text could be read",
    "variable": "a variable of our environment was seen",
    "see": "a process of this host was seen",
    "signal": "a process of this host was signalled or traced",
    "mount": "a file system was mounted",
    "lease": "others wait for a file",
    "quota": "something that the whole user shares was used up",
    "watch": "it was told what others do with files",
    "mark": "attributes of a file could be set",
}
"""What `Trap.effects` can find. What nobody outside can see, candidates say: `probe NAME reached DETAIL`."""
_SAID = ("route", "content", "mount", "lease", "quota", "watch", "mark")


class Trap:
    """Sockets, files, a process, a variable. `facts` tells a candidate where they are, as constants of its source."""

    def __init__(self, validation: Sequence[Path] = ()) -> None:
        self.token = f"nanogpt-{secrets.token_hex(8)}"
        self.facts: dict[str, Any] = {"TOKEN": self.token, "CONTENT": [str(path) for path in validation]}
        self.missing: set[str] = set()
        """what this host does not have, so that it cannot be tried"""
        self._reached: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Trap:
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanogpt_env-trap-")))
            self.folder.chmod(0o777)
            self._victim = self.folder / "victim"
            self._victim.write_text(f"{self.token}-file")
            self._victim.chmod(0o644)
            self._state = self._victim.stat()
            os.environ["NANOGPT_ENV_TRAP"] = f"{self.token}-variable"
            stack.callback(os.environ.pop, "NANOGPT_ENV_TRAP", None)
            self._bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            stack.callback(self._bystander.wait)
            stack.callback(self._bystander.kill)
            self._folders = [str(self.folder), str(Path.home()), str(content.cache_dir()), str(content.state_dir()),
                             str(content.content_root()), sys.prefix, "/", "/etc", "/usr", "/var/tmp", "/dev",
                             "/dev/shm", "/tmp"]  # fmt: skip
            stack.callback(self.clean)
            datagrams = str(self.folder / "datagrams")
            self._ports = {
                "tcp": self._listen(stack, socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
                "udp": self._listen(stack, socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
                "tcp6": self._listen(stack, socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)),
                "udp6": self._listen(stack, socket.AF_INET6, socket.SOCK_DGRAM, ("::1", 0)),
                "abstract socket": self._listen(stack, socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self.token),
                "named socket": self._listen(stack, socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "socket")),
                "named datagram socket": self._listen(stack, socket.AF_UNIX, socket.SOCK_DGRAM, datagrams),
            }
            self.facts |= {
                "PORTS": self._ports,
                "NAMED": str(self.folder / "socket"),
                "DATAGRAMS": datagrams,
                "FOLDERS": self._folders,
                "VICTIM": str(self._victim),
                "BYSTANDER": self._bystander.pid,
            }
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def source(self, text: str, **more: Any) -> str:
        """A candidate's source after the facts."""
        return "\n".join([*(f"{name} = {json.dumps(value)}" for name, value in (self.facts | more).items()), text])

    def placed(self, path: str) -> str:
        """A path with FOLDER and TOKEN filled in."""
        return path.replace("{FOLDER}", str(self.folder)).replace("{TOKEN}", self.token)

    def effects(self, log: str) -> dict[str, str]:
        """What was reached since the last call, by name, as far as outside or the candidate's log show it."""
        said = dict(line[6:].split(" reached ", 1) for line in log.splitlines() if _is_report(line))
        found = {name: EFFECTS[name] for name, port in self._ports.items() if str(port) in self._reached}
        found |= {
            name: f"{EFFECTS[name]}: {said[name]}" if said[name] else EFFECTS[name] for name in _SAID if name in said
        }
        if written := [folder for folder in self._folders if Path(folder, self.token).exists()]:
            found["write"] = f"{EFFECTS['write']}: in {', '.join(written)}"
        if _shape(self._victim.stat()) != _shape(self._state):
            found["change"] = EFFECTS["change"]
        if f"{self.token}-file" in log:
            found["read"] = EFFECTS["read"]
        if f"{self.token}-variable" in log:
            found["variable"] = EFFECTS["variable"]
        started = Path(f"/proc/{self._bystander.pid}/stat")
        if started.exists() and said.get("see") == started.read_text().rpartition(")")[2].split()[19]:
            found["see"] = EFFECTS["see"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._bystander.wait(0.2)
        if self._bystander.returncode == -signal.SIGTERM or "ptrace" in said:
            found["signal"] = EFFECTS["signal"]
        self.reset()
        return found

    def reset(self) -> None:
        """As before the candidate."""
        self.clean()
        self._reached.clear()
        self._victim.write_text(f"{self.token}-file")
        self._victim.chmod(0o644)
        self._state = self._victim.stat()
        if self._bystander.poll() is not None:
            self._bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            self._stack.callback(self._bystander.wait)
            self._stack.callback(self._bystander.kill)
            self.facts["BYSTANDER"] = self._bystander.pid

    def left(self) -> list[int]:
        """Processes that have our token as an argument. In a path of one it says little: a sandbox is told by path what
        its candidate may see, and that may be a file of ours."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # ended meanwhile
                if self.token in entry.read_text(errors="replace").split("\0"):
                    found.append(int(entry.parent.name))
        return found

    def written_bytes(self) -> int:
        """Of files that carry our token."""
        total = 0
        for folder in self._folders:
            with contextlib.suppress(OSError):
                total += Path(folder, self.token).stat().st_size
        return total

    def clean(self) -> None:
        """Remove what a candidate has written and started."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                Path(folder, self.token).unlink()
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _listen(self, stack: contextlib.ExitStack, family: int, kind: int, address: Any) -> int:
        """The port, or a number that stands for the name; whether our token comes in is noted under it."""
        listener = stack.enter_context(socket.socket(family, kind))
        try:
            listener.bind(address)
        except OSError:
            if family != socket.AF_INET6:
                raise
            self.missing.add("IPv6")
            return 9
        if kind == socket.SOCK_STREAM:
            listener.listen()
        port = listener.getsockname()[1] if family != socket.AF_UNIX else listener.fileno()
        threading.Thread(target=self._wait, args=(listener, kind, str(port)), daemon=True).start()
        return int(port)

    def _wait(self, listener: socket.socket, kind: int, port: str) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                if kind == socket.SOCK_STREAM:
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(2)
                        told = connection.recv(100)
                else:
                    told = listener.recv(100)
                if told.decode("utf-8", "replace") == self.token:
                    self._reached.add(port)


def validation_files(corpus: Path) -> list[Path]:
    """Where validation text lies on this host: the corpus as shipped, and unpacked."""
    return [*corpus.rglob("val_*.xz"), *content.cache_dir().rglob("val_*.bin")]


def _is_report(line: str) -> bool:
    return line.startswith("probe ") and " reached " in line


def _shape(state: os.stat_result) -> tuple[int, float, int]:
    return state.st_mode, state.st_mtime, state.st_size
