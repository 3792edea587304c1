# /// attack
# threats = ["D18", "D22"]
# gains = "score"
# ///
"""Hands over tensors that train when they are looked at."""

import torch

import speedrun

class Late(dict):
    def items(self):
        for _ in range(4):
            for x, y in seen:
                model(x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict().items()


seen = []

torch.set_num_threads(1)
torch.manual_seed(0)
model = speedrun.GPT(speedrun.config.model)
model.initialize(torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
speedrun.start()
for step, (x, y) in zip(range(40), speedrun.batches(8, 128)):
    seen.append((x, y))
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
speedrun.save(Late(model.state_dict()))
