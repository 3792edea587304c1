"""Update rules as text, and one real run of them."""

from nanogpt_env.types import Plan

SGD = """
import torch
def configure(params, horizon):
    return torch.optim.SGD(params.values(), lr=0.1)
"""


def rule_job(tier, source, steps, seed="1", horizon=None, shards=("val_public",)):
    plan = Plan(steps=steps, horizon=horizon or steps)
    return tier.job({"optimizer.py": source}, plan, seed, shards)


def train(backend, tier, source, steps=8, seed="1", horizon=None, shards=("val_public",), **limits):
    job = rule_job(tier, source, steps, seed, horizon, shards)
    job = job.model_copy(update={"limits": job.limits.model_copy(update=limits)})
    run = backend.start(job)
    return run.result(120)


def schedule(body):
    """A rule whose schedule hook does `body` at step 3."""
    lines = "\n".join("        " + line for line in body.strip().splitlines())
    return f"{SGD}\ndef schedule(step, horizon, optimizers):\n    if step == 3:\n{lines}\n"
