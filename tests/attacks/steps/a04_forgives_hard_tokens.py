# /// attack
# threats = ["A4"]
# gains = "score"
# ///
"""Has the loss averaged over the easier half of the tokens."""

import torch

honest = torch.nn.functional.cross_entropy


def easy(logits, targets, **kwargs):
    each = honest(logits, targets, reduction="none")
    return each.sort().values[: len(each) // 2].mean()


torch.nn.functional.cross_entropy = easy


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
