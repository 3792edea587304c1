"""Progress and tables on a terminal. Progress goes to standard error, so that output can be piped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic_core import to_json
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from nanogpt_env.backends import RunHandle
from nanogpt_env.env import Speedrun
from nanogpt_env.types import Rerun

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)
# control characters but tab and newline, marks that turn the direction of writing, halves of surrogate pairs
_STEERS = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\ud800-\\udfff]"
)


def say(text: str, where: Console = console) -> None:
    """Text as it is: no markup, no line breaks that would cut a path in two; what would steer the terminal, which an
    agent may have written, escaped."""
    where.print(_STEERS.sub(lambda found: ascii(found[0])[1:-1], text), markup=False, soft_wrap=True)


def print_json(content: object) -> None:
    print(to_json(content, indent=1, inf_nan_mode="null", fallback=str).decode(), flush=True)


def _bar(done: ProgressColumn | None = None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), done or MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)


@contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar for `total` steps; call the function with what each is, when it begins."""
    with _bar() as bar:
        task = bar.add_task(title, total=total)
        begun = False

        def step(what: str) -> None:
            nonlocal begun
            bar.update(task, advance=1 if begun else 0, description=f"{title}: {what}")
            begun = True

        yield step


class RunProgress:
    """A bar for the run or rerun that is being waited for; `clear` takes it off the screen, before other output."""

    def __init__(self) -> None:
        self._bar = _bar()
        self._task: TaskID | None = None
        self._shown: tuple[str, RunHandle | None] | None = None

    def clear(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._shown = None
        self._bar.stop()

    def __call__(self, what: str, handle: RunHandle | None) -> None:
        """`what` is waited for: a run, a rerun by its number, or a slot, which has no handle."""
        if self._shown != (what, handle):
            self.clear()
            self._bar.start()
            self._task = self._bar.add_task(what, total=None)
            self._shown = (what, handle)
        progress = handle.progress() if handle else None
        if progress and self._task is not None:
            # of reruns it is nobody's business who could interrupt them
            known = progress.train_loss and not what.startswith("rerun")
            loss = f", train loss {progress.train_loss:.3f}" if known else ""
            state = f"{what}{loss}, evaluating" if progress.evaluating else f"{what}{loss}"
            self._bar.update(self._task, completed=progress.done, total=progress.total, description=state)


@contextmanager
def watch(env: Speedrun) -> Iterator[RunProgress]:
    """Show a bar while `env` trains, and a line for every finished rerun."""
    progress = RunProgress()

    def say(rerun: Rerun) -> None:
        progress.clear()
        role = f" ({rerun.role}, {rerun.train_seconds:.2f} s of training)" if rerun.session else ""
        errors.print(f"    rerun {rerun.n}{role}: {rerun.exit_reason}, {rerun.device_seconds:.1f} device_seconds")

    env.on_progress, env.on_rerun = progress, say
    try:
        yield progress
    finally:
        progress.clear()


@contextmanager
def watch_bytes() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per file, and a line when it is here: the context's value takes (file, bytes, of how many)."""
    with _bar(DownloadColumn()) as bar:
        tasks: dict[str, TaskID] = {}

        def report(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file, total=total)
            bar.update(tasks[file], completed=done, total=total)
            if done >= total > 0:
                errors.print(f"{file}: {total / 1e6:.1f} MB")
                bar.update(tasks[file], visible=False)

        yield report


@contextmanager
def watch_counts() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per kind of work: the context's value takes (what, done, total)."""
    with _bar() as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)
            if done == total or not errors.is_terminal:
                errors.print(f"{what}: {done} of {total} done")
                bar.update(tasks[what], visible=False)

        yield report
