# expect: must define configure
import torch


class Rule:
    def configure(params, horizon):
        return torch.optim.AdamW(params.values(), lr=4e-3)
