"""Who made something that outlives a killed process: a name for a process that no later one gets."""

from __future__ import annotations

import os
from pathlib import Path


def name(pid: int | None = None) -> str:
    """Pid namespace, number and start time, of this process by default. Raises `OSError` if there is no such one."""
    pid = os.getpid() if pid is None else pid
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return f"{_namespace()}-{pid}-{fields[19]}"


def is_dead(owner: str) -> bool:
    """Whether the process of that name has ended; False for one of another pid namespace, of which we cannot know."""
    space, _, rest = owner.partition("-")
    pid = rest.partition("-")[0]
    if space != _namespace() or not pid.isdigit():
        return False
    try:
        return name(int(pid)) != owner
    except OSError:
        return True


def _namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)
