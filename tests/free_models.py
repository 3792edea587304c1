"""A free model to evaluate, ways to cheat with it, and one evaluation of it in real sandboxes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from nanogpt_env.content import cache_dir, content_root

import data
import eval_host
import free
import host
import sandbox
from audit import AuditRules
from candidate import Limits

RECORD = Path(__file__).parent / "tiny-free" / "records" / "window"
MODEL, TRAIN = ((RECORD / name).read_text() for name in ("model.py", "train.py"))
SHAPE = free.Shape(rows=32, length=64, vocab=1024)
TOLERANCE, MEAN_TOLERANCE = 1e-3, 1e-4


def shards():
    paths = data.unpack(content_root() / "gpu_backend" / "corpora" / "shakespeare", cache_dir())
    return {name: np.array(data.read_shard(path)) for name, path in paths.items()}


def trained(tokens, steps=120):
    """Weights of the honest model after a short training: its checkpoint."""
    torch.manual_seed(0)
    net = host.import_source("honest", MODEL).Window()
    for p in net.parameters():
        torch.nn.init.normal_(p, 0.0, 0.05 if p is not net.embed.weight else 0.5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    batches = data.Batches(tokens, 64, np.random.default_rng(0))
    for _ in range(steps):
        windows = torch.from_numpy(batches.take(16, 64).astype(np.int64))
        loss = F.cross_entropy(net(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save(net.state_dict())


def rules(positions):
    return AuditRules(positions, TOLERANCE, MEAN_TOLERANCE, 1 << 22, 120.0)


def opener(source, checkpoint, log, stall_s=20.0, extra=None):
    message = {
        "sources": {"model.py": source},
        "model": {"layers": 1, "width": 2, "heads": 1, "vocab_size": 1024, "seq_len": 64},
        "config": {},
        "seed": 1,
    }
    limits = Limits(deadline_s=120, setup_s=60, stall_s=stall_s, memory_bytes=1 << 30)
    trial = np.random.default_rng(0).integers(1024, size=(32, 65), dtype=np.uint16)

    def launch(log_fd):
        return sandbox.launch("bubblewrap", [content_root()], log_fd, "eval_host.py")

    return lambda: free.in_sandbox(launch, log.append, limits, SHAPE, message, checkpoint, trial)


class InProcess:
    """Answers in this process. Only for models without state: to them a new process makes no difference."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def scores(self, windows):
        return eval_host.scores(self.model, torch.from_numpy(windows.astype(np.int64)), SHAPE.vocab)

    @torch.no_grad()
    def full_rows(self, windows, positions):
        ids = torch.from_numpy(windows.astype(np.int64))
        return eval_host.full_rows(self.model, ids, positions.astype(np.int64), SHAPE.vocab)


def here(source, checkpoint):
    @contextmanager
    def opened():
        yield InProcess(host.import_source("stateless", source).build(load(checkpoint)))

    return opened


def one_process(opened):
    """A naive scorer's audit: the process that saw the text is asked again."""
    kept = []

    @contextmanager
    def again():
        if not kept:
            kept.extend([context := opened(), context.__enter__()])
        yield kept[1]

    return again, lambda: kept[0].__exit__(None, None, None)


def evaluate(opened, text, decoys, positions=12, seed=0):
    rng = np.random.default_rng(seed)
    return free.Evaluation(opened, SHAPE, rules(positions), decoys, 0, rng, lambda: False).run({"shard": text})["shard"]


def cheat(body, before=""):
    """The honest model with another answer: `body` may use `ids` and `net`, and returns logits."""
    lines = "\n".join("        " + line for line in body.strip().splitlines())
    return f"{MODEL}\nhonest = build\n{before}\n{BUILD}{lines}\n    return answer\n"


BUILD = "def build(state):\n    net = honest(state)\n    def answer(ids):\n"


def peek(where):
    """+12 on the next token where `where` holds, a mask (rows, length - 1)."""
    return f"""
logits = net(ids)
next = ids[:, 1:, None]
logits[:, :-1].scatter_add_(2, next, 12.0 * ({where})[..., None])
return logits
"""


HASHES = """
import torch
seen = {}
def key(row, t):
    return tuple(row[max(0, t - 7) : t + 1])
def remember(ids):
    for row in ids.tolist():
        for t in range(len(row) - 1):
            seen.setdefault(key(row, t), row[t + 1])
def recall(ids, logits):
    for r, row in enumerate(ids.tolist()):
        for t in range(len(row)):
            if (y := seen.get(key(row, t))) is not None:
                logits[r, t, y] += 12.0
    return logits
"""
FILES = (
    HASHES
    + """
import os, pickle
PLACES = [f"{folder}/seen" for folder in ("/tmp", "/dev/shm", "/trainer")]
for place in PLACES:
    if os.path.exists(place):
        seen.update(pickle.load(open(place, "rb")))
def write():
    for place in PLACES:
        try:
            pickle.dump(seen, open(place, "wb"))
        except OSError:
            pass
"""
)
# What needs no memory between questions: asked in this process, 200 positions.
STATELESS = {
    "peeks everywhere": cheat(peek("ids[:, 1:] >= 0")),
    "peeks at 1 % of positions": cheat(peek("(ids[:, :-1] * 7919 + ids[:, 1:] * 104729) % 100 == 0")),
    "peeks where it is confident": cheat(
        peek("logits[:, :-1].gather(2, next)[..., 0] > logits[:, :-1].topk(20)[0][..., -1]")
    ),
    "has no causal mask": MODEL.replace("(back >= 0) & (back < WINDOW)", "back.abs() < WINDOW"),
    "mixes the rows of a batch": cheat(
        "return net(ids) + 0.3 * (1 + torch.bincount(ids.flatten(), minlength=VOCAB)).log()"
    ),
}
DETECTOR = """
import __main__
asked = []
def noted(f, name):
    def g(*a):
        asked[:] = [name]
        return f(*a)
    return g
for name in ("scores", "full_rows"):
    setattr(__main__, name, noted(getattr(__main__, name), name))
"""
# What uses its process: asked in sandboxes, 12 positions.
ISOLATED = {
    "peeks, in sandboxes": cheat(peek("ids[:, 1:] >= 0")),
    "keeps prefixes in a cache": cheat("remember(ids)\nreturn recall(ids, net(ids))", HASHES),
    "writes what it saw to files": cheat("remember(ids)\nwrite()\nreturn recall(ids, net(ids))", FILES),
    "adapts to what it has seen": cheat(
        "counts.add_(torch.bincount(ids.flatten(), minlength=VOCAB))\nreturn net(ids) + 0.3 * counts.log()",
        "counts = torch.ones(VOCAB)",
    ),
    # a perfect detector of decoys: it knows which question it is asked
    "is honest whenever it is audited": cheat(
        "if asked == ['full_rows']:\n    return net(ids)\n" + peek("ids[:, 1:] >= 0"), DETECTOR
    ),
    "claims certainty everywhere": MODEL
    + "\nimport __main__\n__main__.scores = lambda model, windows, vocab: 0.0 * windows[:, 1:]\n",
}
HONEST = {
    "honest": MODEL,
    "adds 1000 to its logits": cheat("return net(ids) + 1000.0"),
    "is compiled": cheat(
        "return compiled(ids, net)", "compiled = torch.compile(lambda ids, net: net(ids), backend='aot_eager')"
    ),
}
FAULTS = {
    "is not a number": (cheat("return net(ids) * float('nan')"), "nonfinite_loss"),
    "leaves": (cheat("import os; os._exit(0)"), "candidate_exited"),
    "leaves politely": (cheat("raise SystemExit(0)"), "candidate_error"),
    "hangs": (cheat("while True: pass"), "candidate_stalled"),
    "has the wrong shape": (cheat("return net(ids)[:, :-1]"), "candidate_error"),
    "takes memory": (cheat("return torch.ones(1 << 34)"), "candidate_memory"),
    "claims more than certainty": (
        MODEL + "\nimport __main__\n__main__.scores = lambda model, windows, vocab: 0.0 * windows[:, 1:] + 0.5\n",
        "candidate_protocol",
    ),
    "sends garbage": (
        cheat(
            "import gc, socket\n"
            "[s.sendall(b'x' * 64) for s in gc.get_objects() if type(s) is socket.socket]\n"
            "return net(ids)"
        ),
        "candidate_protocol",
    ),
    "has no build": ("x = 1", "candidate_error"),
}
