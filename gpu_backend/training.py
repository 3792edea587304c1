"""A run's data, model and evaluation, and the loop of the steps track. No candidate code here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import data
from candidate import Limits, RunFailed
from model import GPT, ModelConfig, flops_per_token
from process import Process
from rule import Flat, IsolatedRule, Rule

if TYPE_CHECKING:
    from trainer import Job, Result, StepsJob

PROGRESS_EVERY_S = 0.25
EVAL_SEQUENCES = 32


class Setting:
    """One run's data, model and evaluation. Token ids are relabelled by a permutation of this run, so that
    text or tables which a candidate brings along mean nothing here."""

    def __init__(self, job: Job, result: Result, cancelled: Callable[[], bool]) -> None:
        self.result, self.cancelled = result, cancelled
        self.started = time.monotonic()
        self.config, self.limits = ModelConfig(**job.model), Limits(**job.limits)
        shards = data.load(Path(job.corpus), Path(job.cache), {*job.train_shards, *job.final_shards})
        generator = np.random.default_rng(job.stream_seed("relabel"))
        self.special_ids = data.load_manifest(Path(job.corpus)).special_ids
        labels = data.permutation(self.config.vocab_size, self.special_ids, generator)
        self.tokens = data.joined([shards[n] for n in job.train_shards], labels)
        self.val = {n: data.relabel(shards[n], labels) for n in job.final_shards}
        self.model = GPT(self.config)

    def evaluate(self, tokens: np.ndarray) -> float:
        """The model's mean cross-entropy over consecutive, non-overlapping sequences; a tail shorter than one is left.

        Raises `RunFailed` if it is not finite, or on cancellation."""
        length = self.config.seq_len
        count = (len(tokens) - 1) // length
        if count < 1:
            raise ValueError(f"a validation shard needs more than {length} tokens, has {len(tokens)}")
        ids = torch.from_numpy(tokens[: count * length + 1].astype(np.int64))
        inputs, targets = ids[:-1].view(count, length), ids[1:].view(count, length)
        total = 0.0
        with torch.no_grad():
            for i in range(0, count, EVAL_SEQUENCES):
                if self.cancelled():
                    raise RunFailed("cancelled", "the run was cancelled in its evaluation")
                part = inputs[i : i + EVAL_SEQUENCES], targets[i : i + EVAL_SEQUENCES]
                total += self.model(*part).item() * len(part[0])
        if not math.isfinite(total):
            raise RunFailed("nonfinite_loss", f"the validation loss was {total / count} at step {self.result.steps}")
        return total / count


class Training(Setting):
    """The steps track: the loop is ours, the update rule the candidate's."""

    def __init__(self, job: StepsJob, result: Result, cancelled: Callable[[], bool]) -> None:
        super().__init__(job, result, cancelled)
        self.job = job
        self.batches = data.Batches(self.tokens, job.batch_size, np.random.default_rng(job.stream_seed("batches")))
        self.model.initialize(torch.Generator().manual_seed(job.stream_seed("init")))
        self.flat = Flat(self.model)

    def train(self, process: Process, progress: Callable[[], None]) -> Tensor:
        """Train with the candidate's rule; return the flat parameters to evaluate. Raises `RunFailed`."""
        seed = self.job.stream_seed("rule")
        rule = IsolatedRule(process, self.flat, self.job.source, self.job.horizon, seed, self.limits)
        try:
            return self.train_with(rule, progress)
        finally:
            self.result.rule_time_ratio = rule.total_rule_s / max(rule.total_forward_backward_s, 1e-9)
            self.result.candidate_peak_bytes = process.peak_bytes()

    def train_with(self, rule: Rule, progress: Callable[[], None]) -> Tensor:
        """Run all steps; return the flat parameters to evaluate. Raises `RunFailed`."""
        job, result = self.job, self.result
        points, told = set(job.points), time.monotonic()
        began = time.monotonic()
        for step in range(job.steps):
            self._check(step)
            loss, seconds = self.forward_backward()
            if not math.isfinite(loss):
                raise RunFailed("nonfinite_loss", f"the training loss was {loss} at step {step}")
            result.train_losses.append(loss)
            rule.step(step, seconds)
            result.steps = step + 1
            result.tokens = result.steps * job.batch_size * self.config.seq_len
            result.flops = result.tokens * flops_per_token(self.config)
            if result.steps in points and result.steps < job.steps:
                # readout is asked for at the same steps in runs and reruns: nothing tells them apart
                self._evaluate_point(rule.readout())
            if time.monotonic() - told > PROGRESS_EVERY_S:
                told = time.monotonic()
                progress()
        result.train_seconds = time.monotonic() - began
        return rule.readout().clone()

    def _check(self, step: int) -> None:
        if self.cancelled():
            raise RunFailed("cancelled", f"the run was cancelled at step {step}")
        if time.monotonic() - self.started > self.limits.deadline_s:
            raise RunFailed(
                "deadline",
                f"the run's {self.limits.deadline_s:g} s were over at step {step} of {self.job.steps}",
            )

    def forward_backward(self) -> tuple[float, float]:
        """(loss, CPU seconds of this thread); the gradients are left in `flat.gradients`."""
        window = torch.from_numpy(self.batches.take(self.job.batch_size, self.config.seq_len).astype(np.int64))
        inputs, targets = window[:, :-1], window[:, 1:]
        began = time.thread_time()
        self.flat.gradients.zero_()
        loss = self.model(inputs, targets)
        loss.backward()
        return loss.item(), time.thread_time() - began

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
