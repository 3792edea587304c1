"""What a served batch costs against a plain memory-mapped loader, from 1 k to 524 k tokens.

    python benchmarks/serving.py [--batches 60] [--repeats 7]

The candidate's side is the real client in another process, without a sandbox, that asks for batch after batch with
nothing to do in between: what is measured is the whole latency, most of which training would hide behind its own work.
The plain loader maps the same shard, slices, and converts to int64 tensors. Writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import statistics
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from nanogpt_env.content import cache_dir, content_root

sys.path.insert(0, str(content_root() / "gpu_backend"))

import data
import host
import speedrun
from timed import SLOTS, STREAMS

SIZES = ((8, 128), (64, 128), (16, 1024), (64, 1024), (8, 65536))


def shard() -> data.Tokens:
    shards = data.unpack(content_root() / "gpu_backend" / "corpora" / "shakespeare", cache_dir())
    return data.read_shard(shards["train"])


def client(fd: int, memory_fd: int, slot_bytes: int, shape: tuple[int, int], count: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    shared = mmap.mmap(memory_fd, SLOTS * slot_bytes)
    message = {"slot_bytes": slot_bytes, "slots": SLOTS, "checkpoint": 0, "compiled": None, "config": {}, "model": {
        "layers": 1, "width": 2, "heads": 1, "vocab_size": 2, "seq_len": 1}}  # fmt: skip
    speedrun._connect(socket.socket(fileno=fd), shared, message)
    began = time.perf_counter()
    total = sum(int(x[0, 0]) for x, _ in speedrun.batches(shapes=[shape] * count))
    answer.send((time.perf_counter() - began, total))


def served(tokens: data.Tokens, shape: tuple[int, int], count: int) -> float:
    """Seconds a batch through the client, relabelled tokens held in memory as the trainer does."""
    rows, length = shape
    slot_bytes = 2 * rows * (length + 1)
    memory_fd = os.memfd_create("ring")
    os.ftruncate(memory_fd, SLOTS * slot_bytes)
    memory = mmap.mmap(memory_fd, SLOTS * slot_bytes)
    ours, theirs = socket.socketpair()
    receive, answer = get_context("fork").Pipe(False)
    process = get_context("fork").Process(
        target=client, args=(os.dup(theirs.fileno()), memory_fd, slot_bytes, shape, count, answer)
    )
    process.start()
    theirs.close()
    batches = data.Batches(tokens, STREAMS, np.random.default_rng(0))
    for i in range(count):
        frame = host.receive(ours)
        assert frame is not None and frame[1:3] == shape
        view = np.frombuffer(memory, np.uint16, rows * (length + 1), i % SLOTS * slot_bytes)
        view[:] = batches.take(rows, length).ravel()
        host.send(ours, host.DONE, i % SLOTS)
    seconds, _ = receive.recv()
    process.join()
    del view
    return float(seconds) / count


def plain(tokens: data.Tokens, shape: tuple[int, int], count: int) -> float:
    rows, length = shape
    position = 0
    began = time.perf_counter()
    for _ in range(count):
        if position + rows * length + 1 > len(tokens):
            position = 0
        window = torch.from_numpy(tokens[position : position + rows * length + 1].astype(np.int64))
        x, y = window[:-1].view(rows, length), window[1:].view(rows, length)
        int(x[0, 0]), int(y[0, 0])
        position += rows * length
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    mapped = shard()
    held = np.array(mapped)
    rows = []
    for shape in SIZES:
        pairs = [(served(held, shape, args.batches), plain(mapped, shape, args.batches)) for _ in range(args.repeats)]
        extra = [1e6 * (a - b) for a, b in pairs]
        rows.append(
            {
                "rows": shape[0],
                "length": shape[1],
                "tokens": shape[0] * shape[1],
                "served_us": 1e6 * statistics.median(a for a, _ in pairs),
                "plain_us": 1e6 * statistics.median(b for _, b in pairs),
                "extra_us": statistics.median(extra),
                "extra_us_min": min(extra),
                "extra_us_max": max(extra),
            }
        )
        print("  ".join(f"{k} {v:.0f}" for k, v in rows[-1].items()), flush=True)
    path = Path(__file__).parent / "results" / "serving.json"
    command = f"python benchmarks/serving.py --batches {args.batches} --repeats {args.repeats}"
    path.write_text(json.dumps({"command": command, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
