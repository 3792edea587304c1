"""A server of actions as one writes it at first: parses what comes in, and writes where it is told to."""

import json
from pathlib import Path

action = json.loads(Path("action.json").read_text())
Path(action["path"]).write_text(action["text"])
