# /// attack
# threats = ["G52", "G51"]
# gains = "accepted"
# record = "normuon"
# claim = 138
# naive = "one run"
# ///
"""Stops its training at a time of its own choice, so that its loss varies more, and submits until it is lucky."""

honest_schedule = schedule


def init(params, begin=init):
    global luck
    begin(params)
    luck = 1.0 + 0.3 * float(torch.randn(()))


def schedule(step, horizon, optimizers):
    honest_schedule(step, horizon, optimizers)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= luck
