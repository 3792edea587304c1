# expect: an integer of more than 40 digits
import torch

TABLE = 0x2c805ac7d48457dff3254f2d47595b016c835975efa2ce128c83384811fba56e300a21879cb9f9aabf4ddeaa41f2005bc7537df5a9afa87ad181d9bfaa099a46f25a3c68e8ef99e97afc50cdb8bc6621f2d7fe550262a5aaedec31ef5762762620379089


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)
