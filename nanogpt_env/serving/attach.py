"""A folder that is kept in step with an episode, for agents that edit files with tools of their own.

Only the tier's files are taken from it, by the same rules as an action's. Which episode it belongs to is not believed
from the folder, where an agent could write it, but kept in the state folder of whoever runs the command.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanogpt_env.content import state_dir
from nanogpt_env.env import Speedrun, StepResult
from nanogpt_env.errors import ActionError
from nanogpt_env.ledger import write_whole


class Checkout:
    """The folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
        self.mark = state_dir() / "attached" / f"{name}.json"

    def known(self) -> dict[str, Any]:
        """{"tier", "episode", "judges"} of a folder that is attached, or {}. Raises `ActionError`."""
        try:
            found = json.loads(self.mark.read_text(encoding="utf-8"))
            return {"tier": str(found["tier"]), "episode": str(found["episode"]), "judges": found["judges"]}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ActionError(f"{self.mark} is damaged: {error!r}") from None

    def begin(self, env: Speedrun, tier: str) -> None:
        """A new episode, whose files are written into the folder. Raises `ActionError` if they are there."""
        files = {*env.tier.files, "task.md", "rules.md"}
        if there := sorted(name for name in files if (self.path / name).exists()):
            raise ActionError(f"{self.path} has {', '.join(there)} already; attach another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        env.reset()
        for name, text in {**env.workspace.files, "task.md": env.tier.task, "rules.md": env.rules()}.items():
            if text:
                write_whole(self.path / name, text)
        self.mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = {"folder": str(self.path.resolve()), "tier": tier, "episode": str(env.episode.folder.resolve())}
        write_whole(self.mark, json.dumps(known | {"judges": [seat.model_dump() for seat in env.panel.seats]}))

    def go_on(self, env: Speedrun, episode: Path) -> None:
        """With the episode. The time since the last command counts."""
        try:
            os.utime(episode / "ledger.jsonl")
        except OSError as error:
            raise ActionError(f"the episode of {self.path} cannot be gone on with: {error}") from None
        env.resume(episode)

    def sync(self, env: Speedrun, step: Callable[[dict[str, Any]], StepResult]) -> list[str]:
        """Take what changed in the folder into the workspace: the files that did."""
        changed = []
        for name in env.tier.files:
            try:
                text = _read(self.path / name, env.tier.table.limits.source_bytes)
            except OSError as error:
                why = "is a link; only plain files are taken" if error.errno == errno.ELOOP else error.strerror
                raise ActionError(f"{self.path / name}: {why}") from None
            except ValueError as error:
                raise ActionError(f"{self.path / name}: {error}") from None
            if text != env.workspace.files[name]:
                step({"type": "write_file", "path": name, "text": text})
                changed.append(name)
        return changed


def _read(path: Path, limit: int) -> str:
    """A plain file's text. Links, pipes and the like are not followed: an agent may have laid them."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("is no plain file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"has more than {limit} bytes")
    return data.decode("utf-8")
