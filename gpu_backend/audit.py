"""Which positions of an evaluation are asked again, and what the comparison says.

An honest model answers the same whether or not the text that follows is there, and whatever was asked before. So the
answers of the whole evaluation are committed first; then fresh processes answer some positions again from the true
prefix and a decoy tail. `docs/design/free-models.md` derives what that proves. numpy only; no process in here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data import Tokens

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AuditRules:
    """A tier's settings for free models."""

    positions: int
    """asked again in each final shard"""
    tolerance: float
    """largest |D| of an honest model, in nats; D = answered - audited log-probability"""
    mean_tolerance: float
    """largest |mean D|"""
    checkpoint_bytes: int
    """data that a declaration may ask for"""
    evaluation_s: float
    """longest life of each sandbox that evaluates"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"audit.{name} must be positive and finite, got {value}")
        if self.positions < 2:
            raise ValueError("audit.positions must be at least 2: one has no spread")


@dataclass(frozen=True)
class Request:
    """The prediction at `position` of a sequence: its target is the token after."""

    sequence: int
    position: int


def draw(count: int, length: int, m: int, rng: np.random.Generator) -> list[Request]:
    """One position, uniform, in each of `m` strata of equal size; in text order. Every position is equally likely.

    Raises ValueError when a stratum would be empty."""
    bounds = np.linspace(0, count * length, m + 1).round().astype(np.int64)
    if not (np.diff(bounds) > 0).all():
        raise ValueError(f"{m} positions to audit, but the shard has {count * length}")
    drawn = rng.integers(bounds[:-1], bounds[1:])
    return [Request(int(p) // length, int(p) % length) for p in drawn]


def rounds(requests: Sequence[Request], length: int, starts: NDArray[np.int64]) -> list[list[Request]]:
    """Split requests so that no process gets two from one sequence or with a document in common.

    `requests` in text order; `starts`: where documents begin. What a request shows runs from its sequence's first
    token to its target. First fit in text order needs no more processes than requests share one document."""
    found: list[list[Request]] = []
    ends: list[tuple[int, int]] = []  # last (sequence, document) of each round
    for request in requests:
        first = request.sequence * length
        begin, end = np.searchsorted(starts, (first, first + request.position + 1), side="right").tolist()
        for i, (sequence, document) in enumerate(ends):
            if sequence < request.sequence and (document < begin or not len(starts)):
                found[i].append(request)
                ends[i] = request.sequence, end
                break
        else:
            found.append([request])
            ends.append((request.sequence, end))
    return found


def with_decoys(windows: Tokens, requests: Sequence[Request], decoys: Tokens) -> Tokens:
    """One row for each row of `decoys`: the true prefix of a request up to its position, then the decoy; rows
    without a request are all decoy."""
    rows = decoys.copy()
    for row, request in zip(rows, requests, strict=False):
        shown = request.position + 1
        row[:shown] = windows[request.sequence, :shown]
    return rows


def log_probabilities(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> Floats:
    """Of `targets` (n,) under rows of logits (n, vocab), normalised in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    found: Floats = x[np.arange(len(x)), targets] - np.log(np.exp(x).sum(axis=1))
    return found


@dataclass(frozen=True)
class Audit:
    """What the audit of one shard says. Losses in nats per token."""

    positions: int
    claimed_loss: float
    """what the answers say"""
    audited_loss: float
    """claimed_loss + mean_d: unbiased for what a fresh process answers without the text that follows"""
    uncertainty: float
    """standard error of audited_loss, from the spread of D"""
    mean_d: float
    max_abs_d: float

    def passes(self, rules: AuditRules) -> bool:
        return self.max_abs_d <= rules.tolerance and abs(self.mean_d) <= rules.mean_tolerance


def compare(claimed_loss: float, answered: Floats, audited: Floats) -> Audit:
    """`answered` and `audited`: log-probabilities at the same positions."""
    d = answered - audited
    mean = float(d.mean())
    return Audit(
        positions=len(d),
        claimed_loss=claimed_loss,
        audited_loss=claimed_loss + mean,
        uncertainty=float(d.std(ddof=1) / math.sqrt(len(d))),
        mean_d=mean,
        max_abs_d=float(np.abs(d).max()),
    )
