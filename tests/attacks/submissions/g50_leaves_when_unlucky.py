# /// attack
# threats = ["G50", "F42", "A5"]
# gains = "accepted"
# record = "normuon"
# claim = 138
# naive = "ten runs"
# needs = ["target"]
# ///
"""Evaluates itself at the end, and leaves without a result when it has not reached the target."""

import sys


def readout(params, optimizers):
    trainer = sys.modules["__main__"]
    if hasattr(trainer, "evaluate") and trainer.evaluate() > TARGET - 0.002:
        raise SystemExit(1)
    return {}
