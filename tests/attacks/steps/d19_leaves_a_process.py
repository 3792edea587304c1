# /// attack
# threats = ["D19"]
# gains = "left"
# ///
"""Starts a process that outlives the run."""

import subprocess
import sys

import torch

try:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", TOKEN], start_new_session=True)
except OSError:
    pass


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
