"""Meters of one episode: reserved before use, settled after, never given back by a restore."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nanogpt_env.errors import BudgetError

# Paid by runs; what verification uses is counted apart (`verification_device_seconds`).
RUN_METERS = ("device_seconds", "flops", "tokens", "runs")
METERS = (*RUN_METERS, "submissions", "episode_steps", "wall_seconds")


@dataclass(frozen=True)
class Reservation:
    """Set aside until `Budget.settle`."""

    amounts: Mapping[str, float]


class Budget:
    """`limits` maps every meter to its allowance. `clock` returns seconds and must never go back; `elapsed` of them
    are spent already."""

    def __init__(
        self, limits: Mapping[str, float], clock: Callable[[], float] = time.monotonic, elapsed: float = 0.0
    ) -> None:
        unknown = set(limits) ^ set(METERS)
        if unknown:
            raise ValueError(f"a budget names each of {', '.join(METERS)}; at odds: {', '.join(sorted(unknown))}")
        self.limits = dict(limits)
        self.verification_device_seconds = 0.0
        self._spent = dict.fromkeys(METERS, 0.0)
        self._reserved = dict.fromkeys(METERS, 0.0)
        self._clock, self._began = clock, clock() - elapsed

    def spent(self, meter: str) -> float:
        return self._clock() - self._began if meter == "wall_seconds" else self._spent[meter]

    def left(self, meter: str) -> float:
        """What can still be reserved, not below 0."""
        return max(0.0, self.limits[meter] - self.spent(meter) - self._reserved[meter])

    def reserve(self, amounts: Mapping[str, float]) -> Reservation:
        """Set amounts aside. Raises `BudgetError` naming meter, need and rest, and reserves nothing."""
        for meter, amount in amounts.items():
            if amount > self.left(meter) * (1 + 1e-12):
                raise BudgetError(
                    f"{meter}: {amount:,.6g} needed, {self.left(meter):,.6g} left of {self.limits[meter]:,.6g}"
                )
        for meter, amount in amounts.items():
            self._reserved[meter] += amount
        return Reservation(dict(amounts))

    def settle(self, reservation: Reservation, used: Mapping[str, float]) -> None:
        """Give the reservation back and charge what was used. A charge may exceed its reservation by
        what a kill takes; it is charged all the same."""
        for meter, amount in reservation.amounts.items():
            self._reserved[meter] -= amount
        for meter, amount in used.items():
            self._spent[meter] += amount

    def charge(self, meter: str, amount: float = 1.0) -> None:
        self._spent[meter] += amount

    def exhausted(self) -> str:
        """The meter that ends the episode, or ''. A spent research budget ends nothing: what was found
        can still be submitted."""
        return next((m for m in ("episode_steps", "wall_seconds", "submissions") if self.left(m) <= 0), "")

    def status(self) -> dict[str, dict[str, float]]:
        return {m: {"limit": self.limits[m], "spent": self.spent(m), "left": self.left(m)} for m in METERS}
