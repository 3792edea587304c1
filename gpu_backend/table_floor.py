"""How far counting gets on a tier: the best bigram table that the tier's own model can hold, then a short finish.

With the blocks' outputs at zero the model is a table: next-token logits from the current token, through embedding and
head. It is fitted to the bigram counts of the tokens that a run may use, and stopped where the validation loss is
lowest, which no candidate could see: the figure favours the table. The finish trains the whole model for a few steps.

    python table_floor.py < job.json        prints {"bigrams": loss, "finished": loss}
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, LOGIT_CAP
from timed import Timed
from trainer import Result, WallclockJob

FIT_STEPS, FIT_LR = 400, 0.03
FINISH_SHARE, FINISH_LRS = 0.1, (0.008, 0.002, 0.0005)  # of the tokens; Adam's, the best counts


def table_floor(job: WallclockJob) -> dict[str, float]:
    """Validation loss in nats per token on the first final shard: of the table alone, and after the finish."""
    setting = Timed(job, Result(), lambda: False, None)
    torch.manual_seed(job.stream_seed("candidate"))
    val = setting.val[job.final_shards[0]]
    length = setting.config.seq_len
    rows = job.max_batch_tokens // length
    served = [setting.batches.take(rows, length) for _ in range(job.tokens // (rows * length))]
    counts = sum((bigrams(window, setting.config.vocab_size) for window in served), start=torch.zeros(()))
    fit(setting.model, counts, bigrams(val[None], setting.config.vocab_size))
    found = {"bigrams": setting.evaluate(val)}
    table = {name: t.clone() for name, t in setting.model.state_dict().items()}
    losses = []
    for lr in FINISH_LRS:
        setting.model.load_state_dict(table)
        finish(setting.model, served[: max(1, round(FINISH_SHARE * len(served)))], lr)
        losses.append(setting.evaluate(val))
    return {**found, "finished": min(losses)}


def bigrams(windows: np.ndarray, vocab_size: int) -> Tensor:
    """(vocab, vocab) counts of next tokens by current token."""
    pairs = windows[:, :-1].astype(np.int64).ravel() * vocab_size + windows[:, 1:].ravel()
    counts = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    return torch.from_numpy(counts).float()


def fit(model: GPT, counts: Tensor, val_counts: Tensor) -> None:
    """Make `model` a bigram table: blocks silent, embedding and head fitted to `counts`."""
    model.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                p.zero_()
    embed, head = model.embed.weight, model.head.weight
    optimizer = torch.optim.Adam([embed, head], lr=FIT_LR)
    best, kept = float("inf"), (embed.detach().clone(), head.detach().clone())
    for step in range(FIT_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = FIT_LR * (1 - step / FIT_STEPS)
        # the model's norm, applied to the embedding, is idempotent
        hidden = F.rms_norm(embed, (embed.size(-1),))
        logs = F.log_softmax(LOGIT_CAP * torch.tanh(hidden @ head.T / LOGIT_CAP), dim=-1)
        with torch.no_grad():
            loss = -(val_counts * logs).sum().item() / val_counts.sum().item()
            if loss < best:
                best, kept = loss, (embed.detach().clone(), head.detach().clone())
        optimizer.zero_grad()
        train_loss = -(counts * logs).sum() / counts.sum()
        torch.autograd.backward(train_loss)
        optimizer.step()
    with torch.no_grad():
        embed.copy_(kept[0])
        head.copy_(kept[1])


def finish(model: GPT, windows: list[np.ndarray], lr: float) -> None:
    """A few steps of ordinary training of all parameters, learning rate falling to zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    for step, window in enumerate(windows):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(windows))
        ids = torch.from_numpy(window.astype(np.int64))
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(table_floor(WallclockJob(**json.load(sys.stdin)))))
