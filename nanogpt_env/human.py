"""The public records of the NanoGPT speedrun as typed data: human_records/README.md has sources and cautions."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nanogpt_env.types import Record

PublicTrack = Literal["short", "medium", "optimization", "nanogpt-bench"]
"""The last is no track of the speedrun but part of the short one, timed again on one stack by NanoGPT-Bench."""
FILES: dict[PublicTrack, str] = {
    "short": "track_1_short.json",
    "medium": "track_2_medium.json",
    "optimization": "track_3_optimization.json",
    "nanogpt-bench": "nanogpt_bench_retimed.json",
}
RETIMED_START_S = 163.836
"""seconds of the first row in its original logs: NanoGPT-Bench publishes differences to it only"""
LAST_BEFORE_RULE_CHANGE = 21
"""Of the short track: rows up to it leave ten steps untimed and allow tuning that later ones do not."""
_FOLDER = Path(__file__).parent / "human_records"
_SELECTOR = re.compile(r"#?(?P<number>\d+)|(?:(?P<side>before|after|on) )?(?P<date>\d{4}-\d\d-\d\d)|latest")


class LogStatistics(Record):
    """Of published runs with the code and the step budget of a record's log. Nats, minutes."""

    n: int
    n_logs_in_folder: int
    mean_val_loss: float
    sd_val_loss: float | None
    mean_minutes: float | None = None
    sd_minutes: float | None = None
    hardware: str = ""


class PublicRecord(Record):
    """A row of a public table. `value`: minutes, seconds or steps, as the table's metric says."""

    number: int
    value: float
    date: datetime.date | None
    technique: str
    contributors: tuple[str, ...]
    statistically_valid: bool | None
    """the table's own mark; None where it has none"""
    n_runs: int | None
    mean_val_loss: float | None
    is_record: bool
    log_path: str | None
    log_path_found: str = ""
    """where the log is, if the table's link is stale"""
    pr: int | None
    note: str
    framework_upgrade_only: bool = False
    ai_system: str | None = None
    """credited beside a person"""
    z_margin: float | None = None
    """(3.28 - mean) * sqrt(n), nats"""
    linked_log_minutes: float | None = None
    linked_log_val_loss: float | None = None
    from_logs: LogStatistics | None = None


class PublicTable(Record):
    """One track. Its `records` are rows as they stand, also those that are no record."""

    track: PublicTrack
    metric: Literal["wallclock_minutes", "wallclock_seconds", "steps"]
    target_val_loss: float
    hardware: str
    source: dict[str, str]
    notes: tuple[str, ...] = ()
    records: tuple[PublicRecord, ...]

    def curve(self, human_only: bool = False) -> list[PublicRecord]:
        """The rows that were records, as they fell. `human_only`: without those that credit an AI system."""
        rows = [r for r in self.records if r.is_record and not (human_only and r.ai_system)]
        # by number, not by value: what is timed changed after record 21 of the short track, and 22 reads slower than it
        return sorted(rows, key=lambda r: r.number)

    def select(self, selector: str, human_only: bool = False) -> PublicRecord:
        """A record by number ('29', '#29'), by date ('2025-09-03' or 'on ...': the best of that day), 'before DATE' or
        'after DATE' (the best of those before or after that day, undated and invalid rows left out), or 'latest'.
        Raises `ValueError` that says what there is."""
        match = _SELECTOR.fullmatch(selector.strip())
        if not match:
            raise ValueError(f"{selector!r} is no number, date, 'before DATE', 'after DATE' or 'latest'")
        curve = self.curve(human_only)
        if match["number"]:
            found = [r for r in curve if r.number == int(match["number"])]
        elif match["date"]:
            day, side = _day(match["date"]), match["side"] or "on"
            found = [r for r in _usable(curve) if r.date and _SIDES[side](r.date, day)]
        else:
            found = _usable(curve)
        if not found:
            raise ValueError(f"the {self.track} track has no record {selector!r}: {self._range(curve)}")
        return found[-1]

    def gap(self, start: PublicRecord, anchor: PublicRecord, human_only: bool = False) -> float:
        """What lies between the two, in the table's metric. `human_only`: without the steps of the curve that were made
        with an AI system. Raises `ValueError` unless the anchor is the better one."""
        if not start.value > anchor.value:
            raise ValueError(f"record {anchor.number} is no better than record {start.number}")
        curve, by_ai = self.curve(), 0.0
        for last, row in itertools.pairwise(curve):
            if row.ai_system and start.number < row.number <= anchor.number:
                by_ai += last.value - row.value
        return start.value - anchor.value - (by_ai if human_only else 0.0)

    def cautions(self, start: PublicRecord, anchor: PublicRecord) -> list[str]:
        """What to know before the two are compared."""
        between = [r for r in self.curve() if start.number < r.number <= anchor.number]
        told = [
            f"record {r.number} fails the table's own rule" for r in (start, anchor) if r.statistically_valid is False
        ]
        if upgrades := [str(r.number) for r in between if r.framework_upgrade_only]:
            told.append(f"of what lies between, {', '.join(upgrades)} came by a newer torch only")
        if systems := [f"{r.number} ({r.ai_system})" for r in between if r.ai_system]:
            told.append(f"of what lies between, {', '.join(systems)} credit an AI system")
        if self.track == "short" and start.number <= LAST_BEFORE_RULE_CHANGE < anchor.number:
            told.append(f"what is timed, and what may be tuned, changed after record {LAST_BEFORE_RULE_CHANGE}")
        return told

    def _range(self, curve: Sequence[PublicRecord]) -> str:
        dates = [r.date for r in curve if r.date]
        return f"{curve[0].number} to {curve[-1].number}, {min(dates)} to {max(dates)}"


_SIDES = {"before": lambda d, day: d < day, "after": lambda d, day: d > day, "on": lambda d, day: d == day}


def _usable(curve: Sequence[PublicRecord]) -> list[PublicRecord]:
    return [r for r in curve if r.statistically_valid is not False]


def _day(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text} is no date of the calendar") from None


@functools.cache
def load_table(track: PublicTrack) -> PublicTable:
    """Raises `ValueError` for an unknown track."""
    if track not in FILES:
        raise ValueError(f"a public track is one of {', '.join(FILES)}, not {track!r}")
    if track == "nanogpt-bench":
        return _retimed()
    return PublicTable(**_read(FILES[track]) | {"track": track})


def _retimed() -> PublicTable:
    """Rows of the short track with the seconds that NanoGPT-Bench measured; those without a figure are left out."""
    short, found = load_table("short"), _read(FILES["nanogpt-bench"])
    rows = {row["track_1_number"]: row["seconds_faster_vs_fa3"] for row in found["records"]}
    records = [
        r.model_copy(update={"value": RETIMED_START_S - rows[r.number]})
        for r in short.curve()
        if rows.get(r.number) is not None
    ]
    return PublicTable(
        track="nanogpt-bench",
        metric="wallclock_seconds",
        target_val_loss=short.target_val_loss,
        hardware=short.hardware,
        source=found["source"],
        records=tuple(records),
    )


def _read(name: str) -> Any:
    # the file's keys that no type here has are for readers of the file
    found = json.loads((_FOLDER / name).read_text(encoding="utf-8"))
    return {k: v for k, v in found.items() if k in PublicTable.model_fields}
