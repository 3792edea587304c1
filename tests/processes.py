"""What a command started, and whether it is gone."""

import os
import time
from pathlib import Path


def _table():
    """pid -> (parent, start time) of every process that is not a zombie. What other tests run may have any name."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if fields[0] != "Z":
            found[int(entry.parent.name)] = (int(fields[1]), fields[19])
    return found


def descendants(pid):
    """{(pid, start time)} of everything that `pid` has started and that is its child, or a child's."""
    table, found, parents = _table(), set(), {pid}
    while parents:
        children = {p: start for p, (parent, start) in table.items() if parent in parents}
        found |= set(children.items())
        parents = set(children)
    return found


def left_after(processes, seconds):
    """Command lines of those that are still there after some time; returns early once all are gone."""
    until = time.monotonic() + seconds
    while True:
        table = _table()
        left = [pid for pid, start in processes if pid in table and table[pid][1] == start]
        if not left or time.monotonic() > until:
            return [_command(pid) for pid in left]
        time.sleep(0.05)


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return f"{pid} (ended)"


def of_this_process():
    return descendants(os.getpid())


def command_lines():
    lines = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            lines.append(f"{entry.name} " + (entry / "cmdline").read_text(errors="replace").replace("\0", " "))
        except OSError:
            continue
    return "\n".join(lines)
