# expect: may not import torch.hub
import torch
from torch import hub


def init(params):
    hub.load_state_dict_from_url("http://example.com/weights.pt")


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)
