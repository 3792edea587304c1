"""Runs inside the sandbox: runs the candidate's train.py, with `speedrun` as its line to the trainer."""

from __future__ import annotations

import linecache
import socket
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import host
import speedrun


def serve(control: socket.socket) -> None:
    """One job, to its end."""
    begun = host.begin(control)
    if begun is None:
        return
    message, shared = begun
    try:
        speedrun._connect(control, shared, message)
        source = message["sources"]["train.py"]
        linecache.cache["train.py"] = (len(source), None, source.splitlines(True), "train.py")
        if message["model_rule"] == "free":
            # from here on `import model` is the candidate's; speedrun has taken the tier's classes out of ours
            host.import_source("model", message["sources"]["model.py"])
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(source, "train.py", "exec"), module.__dict__)
        raise RuntimeError("train.py ended without speedrun.save(state)")
    except BaseException as error:  # whatever the candidate raises ends its run, SystemExit too
        host.fail(control, error)


if __name__ == "__main__":
    serve(host.arrive())
