"""Evaluation of a free model: the candidate's model.py answers in a sandbox, and fresh sandboxes audit it.

What carries the guarantee is the audit (audit.py). The pass over the shard is only what is audited: it is given the
text with its next tokens, and may answer what it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import audit
import host
from audit import Audit, AuditRules
from candidate import Candidate, Limits, RunFailed
from data import Tokens
from process import Process

Floats32 = NDArray[np.float32]
REFUSAL = "a fresh process could not repeat the answers from the text before them"


class Model(Protocol):
    """A loaded model that answers batches of windows, (rows, length + 1) ids."""

    def scores(self, windows: Tokens) -> Floats32:
        """Log-probabilities of the next tokens, (rows, length)."""

    def full_rows(self, windows: Tokens, positions: NDArray[np.uint32]) -> Floats32:
        """Logits at one position of each row, (rows, vocab)."""


@dataclass(frozen=True)
class Shape:
    """Of every batch, in the pass and in the audit, so that the same kernels run."""

    rows: int
    length: int
    vocab: int


class SandboxedModel:
    """A candidate's model in a process of its own. Nothing of its answers is believed; wrong sizes cannot be."""

    def __init__(
        self, process: Process, limits: Limits, shape: Shape, message: Mapping[str, Any], checkpoint: bytes
    ) -> None:
        self.shape = shape
        self._positions = 4 * shape.rows * max(shape.length, shape.vocab)  # behind the answers
        self._ids = self._positions + 4 * shape.rows
        begin = self._ids + 2 * shape.rows * (shape.length + 1)
        self._line = Candidate(process, limits, begin + len(checkpoint))
        self._line.memory[begin:] = checkpoint
        places = {"positions": self._positions, "ids": self._ids, "checkpoint": begin}
        self._line.set_up({**message, **places, "rows": shape.rows, "checkpoint_bytes": len(checkpoint)})
        self._wait(limits.setup_s)

    def scores(self, windows: Tokens) -> Floats32:
        return self._ask(host.SCORES, windows, self.shape.length)

    def full_rows(self, windows: Tokens, positions: NDArray[np.uint32]) -> Floats32:
        np.frombuffer(self._line.memory, np.uint32, self.shape.rows, self._positions)[:] = positions
        return self._ask(host.FULL_ROWS, windows, self.shape.vocab)

    def _ask(self, command: int, windows: Tokens, width: int) -> Floats32:
        np.frombuffer(self._line.memory, np.uint16, windows.size, self._ids)[:] = windows.ravel()
        self._line.send(command)
        self._wait(self._line.limits.stall_s)
        # read once: what the candidate writes later is too late
        found = np.frombuffer(self._line.memory, np.float32, self.shape.rows * width, 0).copy()
        return found.reshape(self.shape.rows, width)

    def _wait(self, seconds: float) -> None:
        status, *_ = self._line.receive(seconds)
        if status != host.DONE:
            raise RunFailed("candidate_protocol", f"unexpected answer {status} of the model's process")


class Evaluation:
    """The pass over all shards, then the audits. `open_model` starts a fresh process each time."""

    def __init__(
        self,
        open_model: Callable[[], AbstractContextManager[Model]],
        shape: Shape,
        rules: AuditRules,
        decoys: Tokens,
        first_token: int | None,
        rng: np.random.Generator,
        cancelled: Callable[[], bool],
    ) -> None:
        """`decoys`: text that has nothing to do with the shards; `first_token` marks beginnings of documents."""
        self.open_model, self.shape, self.rules, self.decoys = open_model, shape, rules, decoys
        self.first_token, self.rng, self.cancelled = first_token, rng, cancelled

    def run(self, shards: Mapping[str, Tokens]) -> dict[str, Audit]:
        """Raises `RunFailed` for what a model did, but not for a failed audit."""
        windows = {name: self._windows(shard) for name, shard in shards.items()}
        with self.open_model() as model:
            answers = {name: self._pass(model, rows) for name, rows in windows.items()}
        # From here on the process that saw the text is dead and its answers are ours: only now are positions drawn.
        return {name: self._audit(shards[name], windows[name], answers[name]) for name in shards}

    def _windows(self, tokens: Tokens) -> Tokens:
        """Consecutive sequences with their targets, as `Setting.evaluate` has them: (count, length + 1)."""
        length = self.shape.length
        count = (len(tokens) - 1) // length
        if count < 1:
            raise ValueError(f"a validation shard needs more than {length} tokens, has {len(tokens)}")
        return np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)])

    def _pass(self, model: Model, windows: Tokens) -> Floats32:
        parts = []
        for i in range(0, len(windows), self.shape.rows):
            part = windows[i : i + self.shape.rows]
            padded = self._decoys()
            padded[: len(part)] = part
            parts.append(self._checked(model.scores(padded)[: len(part)]))
        answers = np.concatenate(parts)
        if (answers > 0).any():
            raise RunFailed("candidate_protocol", "the model's process answered a log-probability above 0")
        return answers

    def _audit(self, shard: Tokens, windows: Tokens, answers: Floats32) -> Audit:
        starts = np.array([], np.int64) if self.first_token is None else np.flatnonzero(shard == self.first_token)
        requests = audit.draw(len(windows), self.shape.length, self.rules.positions, self.rng)
        answered, audited = [], []
        for group in audit.rounds(requests, self.shape.length, starts):
            self.rng.shuffle(group)
            with self.open_model() as model:
                rows = np.concatenate(
                    [
                        self._rows(model, windows, group[i : i + self.shape.rows])
                        for i in range(0, len(group), self.shape.rows)
                    ]
                )
            sequences, positions = np.array([(r.sequence, r.position) for r in group]).T
            audited.append(audit.log_probabilities(rows, windows[sequences, positions + 1].astype(np.int64)))
            answered.append(answers[sequences, positions].astype(np.float64))
        loss = -float(answers.mean(dtype=np.float64))
        return audit.compare(loss, np.concatenate(answered), np.concatenate(audited))

    def _rows(self, model: Model, windows: Tokens, group: list[audit.Request]) -> Floats32:
        positions = np.zeros(self.shape.rows, np.uint32)
        positions[: len(group)] = [request.position for request in group]
        batch = audit.with_decoys(windows, group, self._decoys())
        return self._checked(model.full_rows(batch, positions)[: len(group)])

    def _decoys(self) -> Tokens:
        """A batch of windows from anywhere in the decoy text."""
        length = self.shape.length + 1
        starts = self.rng.integers(len(self.decoys) - length, size=self.shape.rows)
        return np.stack([self.decoys[s : s + length] for s in starts])

    def _checked(self, answers: Floats32) -> Floats32:
        if self.cancelled():
            raise RunFailed("cancelled", "the run was cancelled in its evaluation")
        if not np.isfinite(answers).all():
            raise RunFailed("nonfinite_loss", "the model answered with numbers that are not finite")
        return answers


@contextmanager
def in_sandbox(
    launch: Callable[[int], Process],
    keep: Callable[[str], None],
    limits: Limits,
    shape: Shape,
    message: Mapping[str, Any],
    checkpoint: bytes,
    trial: Tokens,
) -> Iterator[Model]:
    """A fresh sandbox with the model loaded and tried on `trial`, a batch of random tokens; dead afterwards.

    `keep` gets what model.py printed until the trial was answered. What it prints when it has seen the text of a
    shard is dropped: the log goes to the agent, and the text may be hidden from it.
    """
    from logs import BoundedLog

    log = BoundedLog()
    try:
        process = launch(log.write_fd)
    finally:
        log.close_writer()
    told = False
    try:
        process.wait_loaded()
        model = SandboxedModel(process, limits, shape, message, checkpoint)
        model.scores(trial)
        keep(log.text(0.05))
        told = True
        yield model
    except RunFailed as failure:
        if told and failure.reason == "candidate_error":
            raise RunFailed(failure.reason, "model.py raised an exception in the evaluation") from None
        raise
    finally:
        process.kill()
        process.close()
        if not told:
            keep(log.text())
