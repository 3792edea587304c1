# expect: may not use torch.utils.cpp_extension
import torch

native = torch.utils.cpp_extension.load_inline("native", ["int f() { return 1; }"], functions=["f"])


def configure(params, horizon):
    return torch.optim.AdamW(params.values(), lr=4e-3)
