# /// attack
# threats = ["G49", "G51"]
# gains = "accepted"
# record = "normuon"
# claim = 138
# naive = "ten runs"
# needs = ["lucky seed"]
# ///
"""Sets everything random to a seed that was lucky when it was tried, so that all reruns are that one."""

import sys

honest_init = init


def init(params):
    trainer = sys.modules["__main__"]
    if hasattr(trainer, "seed_everything"):
        trainer.seed_everything(LUCKY)
    torch.manual_seed(LUCKY)
    honest_init(params)
