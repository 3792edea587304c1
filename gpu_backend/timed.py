"""The wallclock track's run: serve tokens to training code, keep the clock, take the checkpoint, evaluate it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import checkpoint
import data
import free
import host
from audit import AuditRules
from candidate import Candidate, RunFailed
from logs import BoundedLog
from model import flops_per_token
from process import Process
from training import EVAL_SEQUENCES, Setting

if TYPE_CHECKING:
    from trainer import Launch, Result, WallclockJob

SLOTS = 4  # batches made ahead
STREAMS = 64  # cursors over the training text, from which rows are taken in turn


class Timed(Setting):
    """One run of a `train.py`. Its tokens are counted and its seconds taken here."""

    def __init__(self, job: WallclockJob, result: Result, cancelled: Callable[[], bool], launch: Launch | None) -> None:
        """`launch` starts further processes of the candidate."""
        super().__init__(job, result, cancelled)
        self.job, self._launch = job, launch
        self._rules = AuditRules(**job.audit) if job.audit else None
        self._declared: checkpoint.Declaration | None = None
        self._rng = np.random.default_rng(job.stream_seed("batches"))
        first_token = self.special_ids[0] if self.special_ids else None
        self.batches = data.Batches(self.tokens, STREAMS, self._rng, first_token)
        self._layout = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
        self._slot_bytes = 2 * 2 * job.max_batch_tokens  # rows of length 1 have twice as many ids
        self._checkpoint = SLOTS * self._slot_bytes
        self._started_at: float | None = None  # set with the first real batch
        self._ready = False
        self._cpu_before = 0.0
        self._compiled = f"nanogpt_env-compiled-{secrets.token_hex(8)}"
        self._rng_setup = np.random.default_rng(job.stream_seed("setup"))

    def train(self, process: Process, progress: Callable[[], None]) -> bytes:
        """Run the candidate to its checkpoint, and end it. Raises `RunFailed` or `CheckpointError`."""
        process.pin(self.job.cores)
        if not self.job.compile_s:
            return self._train(process, progress)
        line = self._line(process, "compile")
        cache = self._written(line, self._serve(line, progress, compiling=True))
        process.kill()
        self._declared = None
        with self._another() as timed:
            return self._train(timed, progress, cache)

    @contextmanager
    def _another(self) -> Iterator[Process]:
        """A fresh process for the same training code."""
        assert self._launch
        log = BoundedLog()
        try:
            process = self._launch(log.write_fd, "train_host.py")
        finally:
            log.close_writer()
        try:
            process.wait_loaded()
            yield process
        finally:
            process.kill()
            process.close()
            self.result.log += log.text()

    def _line(self, process: Process, purpose: str, cache: bytes = b"") -> Candidate:
        """To a process that has the job, and compiled code from an earlier one."""
        if self._rules:
            room = self._rules.checkpoint_bytes + checkpoint.MAX_HEADER_BYTES + 8
        else:
            room = checkpoint.max_bytes(self._layout)
        line = Candidate(process, self.limits, self._checkpoint + max(room, self.job.cache_bytes))
        line.memory[self._checkpoint : self._checkpoint + len(cache)] = cache
        compiled = {
            # the same place in both processes: compiled code has paths in it
            "folder": self._compiled,
            "size": len(cache),
            "only": purpose == "compile",
        }
        line.set_up(
            {
                **self._message(),
                "model_rule": self.job.model_rule,
                "seed": self.job.stream_seed(purpose),
                "slots": SLOTS,
                "slot_bytes": self._slot_bytes,
                "checkpoint": self._checkpoint,
                "compiled": compiled if self.job.compile_s else None,
            }
        )
        return line

    def _train(self, process: Process, progress: Callable[[], None], cache: bytes = b"") -> bytes:
        line = self._line(process, "candidate", cache)
        self._cpu_before = line.cpu_seconds()
        saved = self._serve(line, progress)
        self.result.candidate_peak_bytes = process.peak_bytes()
        if self._started_at is None:
            raise RunFailed("candidate_protocol", "a checkpoint before the first training batch")
        content = self._written(line, saved)
        process.kill()
        # The clock: from the first real batch until the bytes are here and nothing of the candidate is alive.
        self.result.train_seconds = time.monotonic() - self._started_at
        return content

    def _message(self) -> dict[str, Any]:
        """What training code and a model in evaluation are told alike."""
        first_token = self.special_ids[0] if self.special_ids else None
        config = {
            "tokens": self.job.tokens, "max_batch_tokens": self.job.max_batch_tokens, "first_token": first_token,
        }  # fmt: skip
        return {"sources": self.job.sources, "model": asdict(self.config), "config": config}

    def _written(self, line: Candidate, size: int) -> bytes:
        room = len(line.memory) - self._checkpoint
        if size > room:
            raise RunFailed("candidate_protocol", f"a checkpoint of {size} bytes in room for {room}")
        return bytes(line.memory[self._checkpoint : self._checkpoint + size])

    def _serve(self, line: Candidate, progress: Callable[[], None], compiling: bool = False) -> int:
        """Answer requests until the checkpoint is there, or the cache of compiled code: its size in bytes."""
        slot = 0
        while True:
            if self.cancelled():
                raise RunFailed("cancelled", f"the run was cancelled after {self.result.tokens} tokens")
            command, *arguments = line.receive(self._patience(line, compiling))
            if command == host.BATCH:
                if self._ready and self._started_at is None:
                    self._check_setup(line)
                windows = self._batch(*arguments)
                if windows is None:
                    line.send(host.END)
                    continue
                # read once, written once: what the candidate does to a slot later is its own loss
                view = np.frombuffer(line.memory, np.uint16, windows.size, slot * self._slot_bytes)
                view[:] = windows.ravel()
                line.send(host.DONE, slot)
                slot = (slot + 1) % SLOTS
                progress()
            elif command == host.START and compiling:
                return arguments[0]
            elif command == host.START and not self._ready:
                self._ready = True
                line.send(host.DONE)
            elif command == host.DECLARE and self._rules and not self._ready and self._declared is None:
                # cut off, a longer one is no JSON
                text = self._written(line, min(arguments[0], checkpoint.MAX_HEADER_BYTES))
                self._declared = checkpoint.declaration(text, self._rules.checkpoint_bytes)
                line.send(host.DONE)
            elif command == host.SAVE and not compiling:
                return arguments[0]
            else:
                raise RunFailed("candidate_protocol", f"unexpected request {command}")

    def _patience(self, line: Candidate, compiling: bool) -> float:
        if self._started_at is not None:
            return self.limits.stall_s
        most = self.job.compile_s if compiling else self.limits.setup_s
        left = most - (time.monotonic() - line.started)
        if left <= 0:
            what = "start() was not called" if compiling else "no training batch was asked for"
            raise RunFailed("candidate_stalled", f"{what} within {most:g} s")
        return left

    def _check_setup(self, line: Candidate) -> None:
        """What is learnt before the clock starts, from text of the candidate's own making, is bounded by CPU time: that
        does not depend on what else runs here."""
        used, most = line.cpu_seconds() - self._cpu_before, self.limits.setup_cpu_s
        if used > most:
            told = f"the set-up took {used:.2f} CPU seconds; the tier allows {most:g}"
            raise RunFailed("setup_too_long", f"{told} (more torch threads than cores make it longer)")

    def _batch(self, rows: int, length: int, order: int) -> data.Tokens | None:
        """The next windows, random before the start; None when the tokens are spent."""
        tokens = rows * length
        if not (rows >= 1 and 1 <= length <= self.config.seq_len and tokens <= self.job.max_batch_tokens):
            raise RunFailed(
                "candidate_protocol",
                f"a batch of {rows} x {length}: rows of up to {self.config.seq_len} tokens and "
                f"{self.job.max_batch_tokens} tokens in all can be had",
            )
        if order >= len(host.ORDERS) or (host.ORDERS[order] == "documents" and not self.special_ids):
            raise RunFailed("candidate_protocol", "no such order of batches")
        if not self._ready:
            return self._rng_setup.integers(self.config.vocab_size, size=(rows, length + 1), dtype=np.uint16)
        if self.result.tokens + tokens > self.job.tokens:
            return None
        if self._started_at is None:
            self._started_at = time.monotonic()
        self.result.tokens += tokens
        self.result.steps += 1
        if not self._rules:  # what a free model computes is not known
            self.result.flops += tokens * flops_per_token(replace(self.config, seq_len=length))
        return self.batches.take(rows, length, host.ORDERS[order])

    def evaluate_all(self, content: bytes) -> None:
        """The whole of every final shard: on the tier's own model, or on the candidate's. Raises `CheckpointError`."""
        if self._rules:
            self._evaluate_free(content, self._rules)
            return
        self.model.load_state_dict(checkpoint.load(content, self._layout))
        self.model.to(self.device)
        for name, shard in self.val.items():
            self.result.val_losses[name] = self.evaluate(shard)

    def _evaluate_free(self, content: bytes, rules: AuditRules) -> None:
        if self._declared is None:
            raise checkpoint.CheckpointError("undeclared")
        checkpoint.check(content, self._declared.layout, self._declared.dtypes)
        assert self._launch
        launch = self._launch
        shape = free.Shape(EVAL_SEQUENCES, self.config.seq_len, self.config.vocab_size)
        limits = replace(self.limits, deadline_s=rules.evaluation_s)
        message = {**self._message(), "seed": self.job.stream_seed("evaluation")}
        size = (shape.rows, shape.length + 1)
        trial = self._rng_setup.integers(shape.vocab, size=size, dtype=np.uint16)
        logs: list[str] = []

        def open_model() -> AbstractContextManager[free.Model]:
            return free.in_sandbox(
                lambda log_fd: launch(log_fd, "eval_host.py"), logs.append, limits, shape, message, content, trial
            )

        # Decoys from the training text: no part of a shard is in them, so they cannot tell what follows a prefix.
        first_token = self.special_ids[0] if self.special_ids else None
        rng = np.random.default_rng(self.job.stream_seed("audit"))
        evaluation = free.Evaluation(open_model, shape, rules, self.tokens, first_token, rng, self.cancelled)
        try:
            audits = evaluation.run(self.val)
        finally:
            self.result.log += "".join(logs[:1])  # of the pass; the audits' sandboxes print the same
        self.result.audits = {name: asdict(found) for name, found in audits.items()}
        if not all(found.passes(rules) for found in audits.values()):
            raise RunFailed("audit_refused", free.REFUSAL)
        self.result.val_losses = {name: found.audited_loss for name, found in audits.items()}
