# expect: may not call open
import torch


def init(params):
    with open("/proc/self/maps") as maps:
        print(maps.read())


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)
