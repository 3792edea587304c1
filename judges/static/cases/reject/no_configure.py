# expect: must define configure
import torch

optimizer = torch.optim.AdamW
