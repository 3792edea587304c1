"""A run's data, model and evaluation, and the loop of the steps track. No candidate code here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import data
from candidate import Limits, RunFailed
from model import GPT, ModelConfig, flops_per_token
from process import Process
from ranks import Ranks
from rule import Flat, IsolatedRule, Rule
from saved import Saved, State

if TYPE_CHECKING:
    from trainer import Job, Result, StepsJob

PROGRESS_EVERY_S = 0.25
EVAL_SEQUENCES = 32
STATE_ROOM = 4
"""of a rule's state, as a multiple of its parameters; and a megabyte"""
_SAVED = ("train_losses", "val_points", "steps", "tokens", "flops", "train_seconds")


class Setting:
    """One run's data, model and evaluation. Token ids are relabelled by a permutation of this run, so that
    text or tables which a candidate brings along mean nothing here."""

    def __init__(self, job: Job, result: Result, cancelled: Callable[[], bool], ranks: Ranks | None = None) -> None:
        self.result, self.cancelled, self.ranks = result, cancelled, ranks or Ranks()
        self.started = time.monotonic()
        self.config, self.limits = ModelConfig(**job.model), Limits(**job.limits)
        shards = data.load(Path(job.corpus), Path(job.cache), {*job.train_shards, *job.final_shards})
        generator = np.random.default_rng(job.stream_seed("relabel"))
        self.special_ids = data.load_manifest(Path(job.corpus)).special_ids
        labels = data.permutation(self.config.vocab_size, self.special_ids, generator)
        self.tokens = data.joined([shards[n] for n in job.train_shards], labels)
        self.val = {n: data.relabel(shards[n], labels) for n in job.final_shards}
        self.device, self.numbers = torch.device("cuda" if job.gpu_ids else "cpu"), "fp32"
        self.model = GPT(self.config)
        self.forward: Callable[[Tensor, Tensor], Tensor] = self.model

    def loss(self, window: data.Tokens) -> Tensor:
        """Mean cross-entropy of windows, (rows, length + 1)."""
        ids = torch.from_numpy(window.astype(np.int64))
        if self.device.type == "cuda":
            ids = ids.pin_memory().to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.numbers == "bf16"):
            found: Tensor = self.forward(ids[:, :-1], ids[:, 1:])
        return found

    def evaluate(self, tokens: np.ndarray) -> float:
        """The model's mean cross-entropy over consecutive, non-overlapping sequences; a tail shorter than one is left.

        Raises `RunFailed` if it is not finite, or on cancellation."""
        length = self.config.seq_len
        count = (len(tokens) - 1) // length
        if count < 1:
            raise ValueError(f"a validation shard needs more than {length} tokens, has {len(tokens)}")
        windows = np.lib.stride_tricks.sliding_window_view(tokens[: count * length + 1], length + 1)[::length]
        total = self.ranks.sum(self.ranks.together(partial(self._evaluate_share, windows)))
        if not math.isfinite(total):
            raise RunFailed("nonfinite_loss", f"the validation loss was {total / count} at step {self.result.steps}")
        return total / count

    def _evaluate_share(self, windows: data.Tokens) -> float:
        """Sum of losses over this rank's sequences."""
        total = 0.0
        with torch.no_grad():
            for i in range(self.ranks.rank * EVAL_SEQUENCES, len(windows), self.ranks.size * EVAL_SEQUENCES):
                if self.cancelled():
                    raise RunFailed("cancelled", "the run was cancelled in its evaluation")
                part = windows[i : i + EVAL_SEQUENCES]
                total += self.loss(part).item() * len(part)
        return total


class Training(Setting):
    """The steps track: the loop is ours, the update rule the candidate's."""

    def __init__(
        self, job: StepsJob, result: Result, cancelled: Callable[[], bool], ranks: Ranks | None = None
    ) -> None:
        super().__init__(job, result, cancelled, ranks)
        self.job, self.numbers = job, job.numbers
        self.rows = self.ranks.mine(job.batch_size)
        self.own = self.ranks.mine(job.shards)
        self.batches = data.Batches(self.tokens, job.batch_size, np.random.default_rng(job.stream_seed("batches")))
        self.model.initialize(torch.Generator().manual_seed(job.stream_seed("init")))  # the same on any device
        self.model.to(self.device)
        if job.compile:
            self.forward = torch.compile(self.model)
        self.flat = Flat(self.model, job.shards)
        self.saved = Saved(job, self.ranks) if job.save_every else None

    def train(self, process: Process, progress: Callable[[], None]) -> Tensor:
        """Train with the candidate's rule; return the flat parameters to evaluate. Raises `RunFailed`."""
        job = self.job
        seeds = [job.stream_seed("rule" if i == 0 else f"rule/{i}") for i in range(job.shards)]
        limits, state, room = self.limits, b"", 0
        if self.saved:
            room = STATE_ROOM * 4 * len(self.flat.params) + (1 << 20)
            if found := self.saved.load():
                state = found.rule
                self._restore(found)
                limits = replace(limits, deadline_s=max(1.0, limits.deadline_s - found.loop["seconds"]))
        about = (job.source, job.horizon, seeds, limits, self.own, job.exchange, state, room)
        rule = self.ranks.together(lambda: IsolatedRule(process, self.flat, *about))
        self.ranks.share_(self.flat.parts(self.flat.params))
        # a rule says whether it has a readout when it has seen its own shards: what one rank waits for, all must do
        rule.has_readout = bool(self.ranks.sum(rule.has_readout) == self.ranks.size)
        try:
            return self.train_with(rule, progress)
        finally:
            self.result.rule_time_ratio = rule.total_rule_s / max(rule.total_forward_backward_s, 1e-9)
            self.result.candidate_peak_bytes = process.peak_bytes()
            if self.saved:
                self.saved.remove()

    def _restore(self, found: State) -> None:
        """Go on from there."""
        loop = found.loop
        for name in _SAVED:
            setattr(self.result, name, loop[name])
        self.flat.params.copy_(found.params)
        self.batches.seek(loop["batches"])
        self.started -= loop["seconds"]
        self.result.device_seconds = loop["seconds"] * max(1, len(self.job.gpu_ids))
        self.result.hardware["resumed_at_step"] = loop["steps"]

    def _save(self, rule: Rule) -> None:
        assert self.saved
        assert isinstance(rule, IsolatedRule)
        state = self.ranks.together(rule.state)
        if self.ranks.least(len(state)):  # all can
            loop = {name: getattr(self.result, name) for name in _SAVED}
            loop |= {"batches": self.batches.position(), "seconds": time.monotonic() - self.started}
            self.saved.save(self.result.steps, State(self.flat.params, state, loop))

    def train_with(self, rule: Rule, progress: Callable[[], None]) -> Tensor:
        """Run all steps; return the flat parameters to evaluate. Raises `RunFailed`."""
        job, result = self.job, self.result
        points, told = set(job.points), time.monotonic()
        began = time.monotonic() - result.train_seconds
        for step in range(result.steps, job.steps):
            loss, seconds = self.ranks.together(partial(self._forward_backward, step))
            loss = self.ranks.sum(loss) / self.ranks.size
            if not math.isfinite(loss):
                raise RunFailed("nonfinite_loss", f"the training loss was {loss} at step {step}")
            result.train_losses.append(loss)
            self.ranks.mean_(self.flat.gradients)
            self.ranks.together(partial(rule.step, step, seconds))
            self.ranks.share_(self.flat.parts(self.flat.params))
            result.steps = step + 1
            result.tokens = result.steps * job.batch_size * self.config.seq_len
            result.flops = result.tokens * flops_per_token(self.config)
            if result.steps in points and result.steps < job.steps:
                # readout is asked for at the same steps in runs and reruns: nothing tells them apart
                self._evaluate_point(self._readout(rule))
            result.train_seconds = time.monotonic() - began
            if self.saved and result.steps % job.save_every == 0 and result.steps < job.steps:
                self._save(rule)
            if time.monotonic() - told > PROGRESS_EVERY_S:
                told = time.monotonic()
                progress()
        return self._readout(rule).clone()

    def _readout(self, rule: Rule) -> Tensor:
        found = self.ranks.together(rule.readout)
        if rule.has_readout:
            self.ranks.share_(self.flat.parts(found))
        return found

    def _forward_backward(self, step: int) -> tuple[float, float]:
        self._check(step)
        return self.forward_backward()

    def _check(self, step: int) -> None:
        if self.cancelled():
            raise RunFailed("cancelled", f"the run was cancelled at step {step}")
        if time.monotonic() - self.started > self.limits.deadline_s:
            raise RunFailed(
                "deadline",
                f"the run's {self.limits.deadline_s:g} s were over at step {step} of {self.job.steps}",
            )

    def forward_backward(self) -> tuple[float, float]:
        """(loss, seconds: of this thread's CPU, or of the GPU) of this rank's rows; the gradients are left in
        `flat.gradients`."""
        # all ranks take the whole batch: so they agree on its rows, whatever their number
        window = self.batches.take(self.job.batch_size, self.config.seq_len)[self.rows.start : self.rows.stop]
        clock = time.monotonic if self.device.type == "cuda" else time.thread_time
        began = clock()
        self.flat.gradients.zero_()
        total, most = torch.zeros((), dtype=torch.float64, device=self.device), self.job.micro_batch or len(window)
        for i in range(0, len(window), most):
            part = window[i : i + most]
            loss = self.loss(part)
            if len(part) < len(window):
                loss = loss * (len(part) / len(window))
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
            total += loss.detach()
        return total.item(), clock() - began  # `item` waits for the device

    def _evaluate_point(self, flat_params: Tensor) -> None:
        shard = self.val[self.job.final_shards[0]]
        loss = self._evaluate_at(flat_params, shard[: self.job.point_tokens])
        self.result.val_points.append((self.result.steps, loss))

    def evaluate_all(self, flat_params: Tensor) -> None:
        """The last point, and the whole of every final shard."""
        self._evaluate_point(flat_params)
        for name, shard in self.val.items():
            self.result.val_losses[name] = self._evaluate_at(flat_params, shard)

    def _evaluate_at(self, flat_params: Tensor, tokens: np.ndarray) -> float:
        kept = self.flat.params.clone()
        self.flat.params.copy_(flat_params)
        loss = self.evaluate(tokens)
        self.flat.params.copy_(kept)
        return loss
