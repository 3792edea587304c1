"""The sandboxes as a user without any privilege. The tests may run as root: then these give that up."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = """
import json, sys
from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.testing import check_backend
kind, _, warm = sys.argv[1].partition(" ")
backend = LocalBackend(kind, warm=bool(warm))
report = check_backend(backend, quick=True)
print(json.dumps({**report.as_dict(), "cold_because": backend.cold_because}))
backend.close()
"""


def closed_above(path):
    """The topmost folder above `path` that others may not enter, if there is one."""
    return next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)


def as_nobody(command, home):
    """Shell: in a mount namespace of its own, where what the command needs can be reached by everybody."""
    needed = [Path(p).resolve() for p in dict.fromkeys([sys.base_prefix, sys.prefix, str(ROOT)])]
    lines, mounts = ["set -e"], []
    for number, path in enumerate(needed):
        if closed := closed_above(path):
            keep = f"{home}/keep{number}"
            lines += [f"mkdir -p {keep}", f"mount --bind {shlex.quote(str(path))} {keep}"]
            mounts.append((closed, path, keep))
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {closed}" for closed in dict.fromkeys(closed for closed, *_ in mounts)]
    for _, path, keep in mounts:
        lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --bind {keep} {shlex.quote(str(path))}"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": f"{home}/own", "PYTHONPATH": str(ROOT)}
    environment |= {name: f"{home}/own/{name}" for name in ("NANOGPT_ENV_CACHE", "NANOGPT_ENV_STATE")}
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "-i"]
    words += [f"{name}={value}" for name, value in environment.items()]
    return "\n".join([*lines, f"cd {home}/own", "exec " + shlex.join([*words, *command])])


@pytest.mark.skipif(os.geteuid() != 0, reason="who runs the tests is unprivileged: all others here show the same")
@pytest.mark.parametrize("kind", ["bubblewrap", "bubblewrap warm", "landlock"])
def test_a_sandbox_holds_for_a_user_without_privileges(kind):
    home = tempfile.mkdtemp(prefix="nanogpt_env-nobody-")
    try:
        os.chmod(home, 0o755)
        os.mkdir(f"{home}/own")
        os.chown(f"{home}/own", 65534, 65534)
        script = as_nobody([sys.executable, "-c", CHECK, kind], home)
        done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["ok"] and all(check["outcome"] == "held" for check in report["checks"]), report
        assert ("warm" in kind) == (report["cold_because"] == "")
        assert report["sandbox"]["trusted"] is True
    finally:
        shutil.rmtree(home)
