"""`nanogpt-env judge`: the rules, what a judge is shown, and how judges do on labelled cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nanogpt_env import display
from nanogpt_env.cli_options import DirArgument, JsonOption, TierOption, own_modules
from nanogpt_env.display import console, print_json, say
from nanogpt_env.errors import ActionError
from nanogpt_env.judging import Material, read_rules
from nanogpt_env.judging.cases import Evaluation, Recorder, evaluate, read_cases
from nanogpt_env.judging.llm import LLMJudge
from nanogpt_env.judging.material import show as show_material
from nanogpt_env.judging.panel import find_judge, judge_folder
from nanogpt_env.tiers import load_tier

judge_app = typer.Typer(no_args_is_help=True, help="Judges: their rules, and how they do on labelled cases.")

NameArgument = Annotated[str, typer.Argument(help="Of a shipped judge, a folder, or module:Class.", show_default=False)]


@judge_app.command("eval")
def evaluate_judge(
    name: NameArgument,
    cases: Annotated[Path | None, typer.Option(help="Folder of accept/ and reject/. Default: the judge's.")] = None,
    model: Annotated[str | None, typer.Option(help="anthropic/MODEL, openai/MODEL or recorded.")] = None,
    votes: Annotated[int | None, typer.Option(min=1, max=15, help="Answers about each program.")] = None,
    record: Annotated[Path | None, typer.Option(help="Append the answers to this recorded.jsonl.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Precision, recall, agreement, cost and time of a judge on labelled cases."""
    options: dict[str, Any] = {key: value for key, value in (("model", model), ("votes", votes)) if value is not None}
    if ":" in name:
        own_modules()
    judge = find_judge(name, options)
    if ":" in name and cases is None:
        raise ActionError(f"{name} is a class and has no cases: name a folder of them, --cases")
    folder = cases or judge_folder(name) / "cases"
    if record:
        if not isinstance(judge, LLMJudge):
            raise ActionError(f"{name} gives no answers to record")
        judge.answers = Recorder(judge.answers, record, judge.settings.model)
    known = read_cases(folder)
    with display.steps(name, len(known)) as step:
        found = evaluate(judge, known, step)
    if isinstance(judge, LLMJudge):
        judge.close()
    if as_json:
        print_json(found)
    else:
        _print(found)
    return 0


def _print(found: Evaluation) -> None:
    table = Table("case", "said", "where", title=f"wrong, or not to be had: {found.judge} {found.model}".strip())
    for row in found.rows:
        if not row.right:
            where = "" if row.opinion.outcome == "pass" else row.opinion.text().partition(": ")[2][:100]
            table.add_row(row.case, row.opinion.outcome, where)
    if table.row_count:
        console.print(table)
    dollars = "unknown cost" if found.dollars is None else f"{found.dollars:.4f} dollars"
    say(
        f"{found.cases} cases, {found.unavailable} without an opinion\n"
        f"precision {_with(found.precision, found.precision_interval)}\n"
        f"recall {_with(found.recall, found.recall_interval)}\n"
        f"named a broken rule {_with(found.named)}, agreement of votes {_with(found.agreement)}\n"
        f"{found.input_tokens} tokens in, {found.output_tokens} out, {dollars}, {found.seconds:.1f} s"
    )


def _with(value: float | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


@judge_app.command()
def rules(name: NameArgument = "rulebook", tier: TierOption = "nano-steps", as_json: JsonOption = False) -> int:
    """The rules that a judge holds a tier's programs to."""
    loaded = load_tier(tier, calibrated=False)
    path = judge_folder(name) / "rules.toml"
    if not path.exists():
        raise ActionError(f"judge {name} has no rule book")
    book = read_rules(path).of(loaded.table.track, loaded.model_rule)
    print_json(book) if as_json else say(book.text())
    return 0


@judge_app.command()
def show(folder: DirArgument, tier: TierOption = "nano-steps", as_json: JsonOption = False) -> int:
    """A candidate as a language model is shown it."""
    loaded = load_tier(tier, calibrated=False)
    try:
        sources = {name: (folder / name).read_text(encoding="utf-8") for name in loaded.files}
    except (OSError, UnicodeDecodeError) as error:
        raise ActionError(f"cannot read the candidate: {error}") from None
    shown = show_material(Material.of(loaded, sources))
    if as_json:
        print_json({"parts": shown.parts})
        return 0
    for number, part in enumerate(shown.parts, 1):
        say("\n".join((*([f"part {number} of {len(shown.parts)}"] if len(shown.parts) > 1 else []), *part)))
    return 0
