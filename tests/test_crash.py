"""SIGKILL at any moment: nothing is left running or lying about, and the episode goes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from fakes import FakeBackend
from processes import descendants, left_after

from nanogpt_env import Note, Speedrun
from nanogpt_env.budget import METERS
from nanogpt_env.ledger import read_ledger
from nanogpt_env.replay import replay

import cgroups

# runs and submissions for ever, on real training
PLAYER = """
import sys
from nanogpt_env import Run, Speedrun, Submit, WriteFile
env = Speedrun(sys.argv[1], state_dir=sys.argv[2], sandbox=sys.argv[3])
env.reset()
print(env.episode.folder, flush=True)
fast = env.tier.record("fast").sources["optimizer.py"]
for number in range(1000):
    env.step(WriteFile(path="optimizer.py", text=fast + f"\\nNUMBER = {number}\\n"))
    env.step(Run(horizon=60))
    env.step(Submit(claim=60, horizon=60))
"""
KILLS = 6


def charged(folder):
    """What the ledger alone says was spent."""
    found = dict.fromkeys(METERS, 0.0)
    for line in read_ledger(folder / "ledger.jsonl")[0]:
        for meter, amount in line.get("used", {}).items():
            found[meter] += amount
    return found


def kill_somewhere(sandbox, state, within_s):
    """The folder of an episode whose process was killed, after a random time; all that it had started is gone."""
    process = subprocess.Popen([sys.executable, "-c", PLAYER, str(TINY), str(state), sandbox], stdout=subprocess.PIPE)
    folder = Path(process.stdout.readline().decode().strip())
    time.sleep(random.uniform(0.0, within_s))
    started = descendants(process.pid)
    assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    assert left_after(started, 15) == []
    return folder


def goes_on(folder):
    """Resumes the episode; what it shows as spent."""
    env = Speedrun(TINY, backend=FakeBackend(), state_dir=folder.parent)
    env.resume(folder)
    shown = {meter: env.episode.budget.spent(meter) for meter in METERS}
    env.step(Note(text="alive"))
    env.close()
    return shown


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("sandbox", ["bubblewrap", "landlock"])
def test_a_kill_leaves_nothing_and_loses_nothing(tmp_path, sandbox):
    shared = set(os.listdir("/dev/shm"))
    for _ in range(KILLS // 2):
        folder = kill_somewhere(sandbox, tmp_path, 6.0)
        before = charged(folder)
        after = goes_on(folder)
        assert all(after[meter] >= before[meter] for meter in METERS), (before, after)
        assert replay(folder).differences == []
        assert json.loads((folder / "checkpoint.json").read_text())["history"][-1][0] == "note"
    cgroups.reap()
    mine = [group for parent in cgroups.find()[0] for group in parent.glob(f"{cgroups.PREFIX}-*")]
    assert all(not cgroups.owner.is_dead(group.name.split("-", 1)[1].rpartition("-")[0]) for group in mine)
    assert set(os.listdir("/dev/shm")) <= shared
