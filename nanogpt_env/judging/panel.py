"""The judges of a tier: which there are, what they may do, and what they may cost."""

from __future__ import annotations

import inspect
import pkgutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanogpt_env.content import content_root
from nanogpt_env.errors import ActionError, BackendError, JudgeUnavailable
from nanogpt_env.judging import Judge, Material
from nanogpt_env.judging.llm import RECORDED, LLMJudge, Settings
from nanogpt_env.judging.static import StaticJudge
from nanogpt_env.tables import JudgeSeat
from nanogpt_env.types import Opinion


def judge_folders() -> list[str]:
    """Names of those that are shipped."""
    return sorted(path.parent.name for path in (content_root() / "judges").glob("*/judge.toml"))


def judge_folder(name: str, base: Path | None = None) -> Path:
    """Of a shipped judge, or of your own by its path, relative to `base`. Raises `ActionError`."""
    for folder in (content_root() / "judges" / name, (base or Path()) / name):
        if (folder / "judge.toml").is_file():
            return folder
    raise ActionError(
        f"no judge {name!r}: there are {', '.join(judge_folders())}, folders with a judge.toml, and module:Class"
    )


def find_judge(name: str, options: Mapping[str, Any] | None = None, base: Path | None = None) -> Judge:
    """A shipped judge's name, the path of a folder, or module:Class. options: fields instead of those in `judge.toml`,
    or the class's arguments. Raises `ActionError`, or `JudgeUnavailable` where one cannot work."""
    options = dict(options or {})
    if ":" in name:
        return _own(name, options)
    folder = judge_folder(name, base)
    try:
        fields = tomllib.loads((folder / "judge.toml").read_text(encoding="utf-8"))
        if fields.get("kind") == "static":
            return StaticJudge()
        return LLMJudge(folder.name, folder, Settings(**fields | options))
    except (ValueError, TypeError, ValidationError) as error:
        raise ActionError(f"judge {folder}: {error}") from None


def _own(name: str, options: dict[str, Any]) -> Judge:
    try:
        kind = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ActionError(f"judge {name!r} cannot be imported: {error}") from None
    methods = [getattr(kind, method, None) for method in ("judge", "rules")]
    if not (inspect.isclass(kind) and all(map(callable, methods))):  # before anything is called
        raise ActionError(f"{name!r} is no judge: a class with a name, rules(material) and judge(material)")
    try:
        judge: Any = kind(**options)
    except (TypeError, ValueError) as error:
        raise ActionError(f"judge {name!r} cannot be made: {error}") from None
    if not isinstance(judge, Judge):
        raise ActionError(f"{name!r} is no judge: it has no name")
    return judge


@dataclass
class Spent:
    """What a judge has cost in an episode."""

    tokens: int = 0
    dollars: float = 0.0

    def add(self, opinion: Opinion) -> None:
        self.tokens += opinion.input_tokens + opinion.output_tokens
        self.dollars += opinion.dollars or 0.0


class Panel:
    """Judges with their seats. Raises as `find_judge`."""

    def __init__(self, seats: Sequence[JudgeSeat] = (), base: Path | None = None) -> None:
        self.seats = tuple(seats)
        self.judges = [find_judge(seat.name, seat.options, base) for seat in seats]
        for judge in self.judges:
            if isinstance(judge, LLMJudge) and judge.settings.model == RECORDED:
                raise JudgeUnavailable(
                    f"judge {judge.name} has recorded answers only, about its own cases: name a model that can be "
                    f"asked, as --judge {judge.name}=veto,model=anthropic/MODEL or in the options of env.toml"
                )

    def close(self) -> None:
        for judge in self.judges:
            if isinstance(judge, LLMJudge):
                judge.close()

    def rules(self, material: Material) -> str:
        """All books that a program is held to, as text."""
        books = [judge.rules(material) for judge in self.judges]
        return "\n\n".join(book.text() for book in books if book)

    def deliberate(
        self, material: Material, spent: dict[str, Spent], on_opinion: Callable[[Opinion, str], None]
    ) -> tuple[list[Opinion], Opinion | None]:
        """(opinions, the one that denies if there is one, which is the last). `on_opinion` takes each with its mode, as
        soon as it is there. Raises `JudgeUnavailable` if one that may deny is not to be had."""
        opinions = []
        for seat, judge in zip(self.seats, self.judges, strict=True):
            account = spent.setdefault(seat.name, Spent())
            opinion = self._ask(seat, judge, material, account)
            account.add(opinion)
            on_opinion(opinion, seat.mode)
            opinions.append(opinion)
            if seat.mode == "veto" and opinion.outcome == "unavailable":
                why = f"deferred: the judge {seat.name} is unavailable: {opinion.detail}"
                raise JudgeUnavailable(why, opinion.reached)
            if seat.mode == "veto" and opinion.outcome == "break":
                return opinions, opinion
        return opinions, None

    def _ask(self, seat: JudgeSeat, judge: Judge, material: Material, account: Spent) -> Opinion:
        try:
            tokens, dollars = judge.most(material) if isinstance(judge, LLMJudge) else (1, 0.0)
            if seat.tokens is not None and account.tokens + tokens > seat.tokens:
                detail = f"{account.tokens} of its {seat.tokens} tokens are spent, and this could take {tokens}"
                return Opinion(judge=seat.name, outcome="unavailable", detail=detail)
            if seat.dollars is not None and account.dollars + (dollars or 0.0) > seat.dollars:
                detail = f"{account.dollars:.2f} of its {seat.dollars:g} dollars are spent"
                return Opinion(judge=seat.name, outcome="unavailable", detail=detail)
            return judge.judge(material).model_copy(update={"judge": seat.name})
        except BackendError as error:
            return Opinion(judge=seat.name, outcome="unavailable", detail=str(error))
        except Exception as error:  # one of somebody's own: its failure is ours, not the candidate's
            return Opinion(judge=seat.name, outcome="unavailable", detail=f"{type(error).__name__}: {error}")
