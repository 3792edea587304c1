"""Becomes a bubblewrap in which an agent runs: `python agent_host.py SPECIFICATION`, one JSON object.

command, variables: what runs there, and all of its environment. show: folders to see, read-only, beside system and
interpreter. hide: those that nobody may see, wherever they would show. bind: {outside: inside} to write to. network:
whether it has the host's. A `_content` of this package is hidden in every folder of packages: an installation that is
not the one in use holds the same records and data.

Unlike a candidate an agent has processes, packages and sockets; no tracing, keyrings, or other kinds of sockets.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import bubblewrap
import seccomp
import visible
from process import SandboxError

SCRATCH_BYTES = 1 << 30
PACKAGE = "nanogpt_env"
_NETWORK = ("resolv.conf", "hosts", "nsswitch.conf", "ssl/certs", "ssl/openssl.cnf", "ca-certificates", "pki/tls/certs")


def mounts(show: list[Path], hide: list[Path], network: bool) -> list[str]:
    """bubblewrap options, parents before children, so that a cover lies over what it covers."""
    shown = {*visible.roots(), *show}
    if network:
        shown |= {path for name in _NETWORK if (path := Path("/etc") / name).exists()}
    contents = {c for folder in visible.package_folders() for c in folder.glob(f"{PACKAGE}*/_content")}
    hidden = {p for p in {*hide, *contents} if p.is_dir() and any(s == p or s in p.parents for s in shown)}
    options: list[str] = []
    for path in sorted(shown | hidden, key=lambda p: len(p.parts)):
        if path in hidden:
            options += ["--tmpfs", str(path)]
        elif visible.is_link(path):
            options += ["--symlink", os.readlink(path), str(path)]
        else:
            options += ["--ro-bind", str(path), str(path)]
    return [*options, *(word for path in sorted(hidden) for word in ("--remount-ro", str(path)))]


def arguments(given: dict[str, Any]) -> list[str]:
    """Of bubblewrap, but for the filter and the command."""
    show, hide = ([Path(p) for p in given[key]] for key in ("show", "hide"))
    return [
        "--unshare-all", *(["--share-net"] if given["network"] else []), "--unshare-user", "--disable-userns",
        "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL",
        # the agent itself is the first process of its namespace: with it all others end, and it cannot choose not to
        "--hostname", "agent", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv",
        *(word for key, value in given["variables"].items() for word in ("--setenv", key, value)),
        "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp", *mounts(show, hide, given["network"]),
        "--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--size", str(SCRATCH_BYTES), "--tmpfs", "/dev/shm",
        *(word for outside, inside in given["bind"].items() for word in ("--bind", outside, inside)),
        "--remount-ro", "/", "--chdir", given["folder"],
    ]  # fmt: skip


def main() -> None:
    given = json.loads(sys.argv[1])
    binary, why = bubblewrap.find()
    if not binary:
        raise SandboxError(why)
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as file:
        file.write(seccomp.program(processes=True))
    os.set_inheritable(read_end, True)
    words = [binary, *arguments(given), "--seccomp", str(read_end), "--", *given["command"]]
    os.execve(binary, words, {})  # its own environment would be read there, in /proc


if __name__ == "__main__":
    try:
        main()
    except (SandboxError, OSError) as error:
        sys.exit(f"no sandbox for the agent: {error}")
