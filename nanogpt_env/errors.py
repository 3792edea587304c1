"""What can go wrong, by whose fault.

    NanoGPTError
    ├── TierError      a tier's folder is missing, malformed or out of step with its calibration
    ├── ActionError    the agent's action makes no sense; becomes an observation, never leaves `step`
    │   └── JudgeError the static judge refuses the program
    ├── BudgetError    a meter cannot pay for it; becomes an observation too
    ├── BackendError   our side failed (no torch, trainer died, disk full); never charged to the agent
    │   ├── TrainerKilled  its process was killed from outside: a run that is saved now and then can go on
    │   └── JudgeUnavailable  a judge that may deny cannot be asked: the submission is deferred
    ├── LedgerError    a ledger cannot be read or written
    └── AgentError     an agent of ours cannot be made or cannot go on: options, a model that does not answer

A candidate's own failure is no exception: it is a `RunResult` with an exit reason.
"""

from __future__ import annotations


class NanoGPTError(Exception):
    """Base of all errors raised by this package."""


class TierError(NanoGPTError):
    pass


class ActionError(NanoGPTError):
    pass


class JudgeError(ActionError):
    pass


class BudgetError(NanoGPTError):
    pass


class BackendError(NanoGPTError):
    pass


class TrainerKilled(BackendError):
    pass


class JudgeUnavailable(BackendError):
    """reached: it answered, but not so that an opinion could be had, which may be the program's doing."""

    def __init__(self, message: str, reached: bool = False) -> None:
        super().__init__(message)
        self.reached = reached


class LedgerError(NanoGPTError):
    pass


class AgentError(NanoGPTError):
    pass
