"""The text of observations and renderings."""

from __future__ import annotations

from nanogpt_env.episode import AgentRun, Episode
from nanogpt_env.hardware import mfu
from nanogpt_env.types import Audit, RunResult, Verdict

LOG_CHARACTERS = 4000


def run_text(run: AgentRun, shard: str) -> str:
    """What the agent sees of one of its runs."""
    if run.error:
        return f"{run.handle}: not charged, the backend failed: {run.error}"
    if run.result is None:
        progress = run.process.progress()
        where = f"{progress.done} of {progress.total}" if progress else "starting"
        return f"{run.handle}: running, {where}"
    r = run.result
    how_far = f"{r.steps} of {run.plan.steps} steps, horizon {run.plan.horizon}" if run.plan else f"{r.steps} batches"
    lines = [f"{run.handle}: {r.exit_reason}, {how_far}"]
    if r.shared:
        lines.append("  trained before for an identical run on this host, charged alike")
    if r.detail:
        lines.append(f"  {r.detail}")
    if r.val_losses:
        lines.append(f"  val_loss: {r.val_losses[shard]:.4f} (public shard, nats per token)")
    if r.val_points:
        points = "  ".join(f"{step}: {loss:.4f}" for step, loss in r.val_points)
        lines.append(f"  val_loss by step (small subset): {points}")
    if shard in r.audits:
        lines.append("  " + audit_text(r.audits[shard]))
    if r.train_losses:
        lines.append(f"  train_loss: {r.train_losses[-1]:.4f}")
    time = (
        f"rule_time: {r.rule_time_ratio:.2f} x forward + backward"
        if run.plan
        else f"train_seconds: {r.train_seconds:.2f}"
    )
    used = mfu(r)
    flops = f"{r.flops:.3g}" + (f" (MFU {used:.0%})" if used else "")
    lines.append(f"  tokens: {r.tokens:,}  flops: {flops}  device_seconds: {r.device_seconds:.1f}  {time}")
    lines.append(f"  sandbox: {r.sandbox.name}" + ("" if r.sandbox.trusted else " (trusted: false)"))
    if not r.sandbox.trusted and r.sandbox.note:
        lines.append(f"  {r.sandbox.note}")
    if r.log:
        shown = r.log[-LOG_CHARACTERS:]
        lines.append("  log of the candidate (untrusted):\n" + "\n".join("  | " + x for x in shown.splitlines()))
    return "\n".join(lines)


def verdict_text(verdict: Verdict, reward: float, episode: Episode) -> str:
    loss = "" if verdict.coarse_loss is None else f", mean loss about {verdict.coarse_loss:.3f}"
    claimed = "" if verdict.claim is None else f" claim {verdict.claim} of horizon {verdict.horizon}:"
    same = "This program" if verdict.claim is None else "This program, claim and horizon"
    cached = f" {same} had their verdict before; nothing was rerun." if verdict.cached else ""
    audit = f"\n{audit_text(verdict.audit)}" if verdict.audit else ""
    flags = "".join(
        f"\nflagged by {o.text()}" for o in verdict.opinions if o.outcome != "pass" and not verdict.vetoed_by
    )
    why = "no sandbox; `nanogpt-env doctor` says how to get one"
    if not episode.agent_trusted:
        why = "the agent could run code as this user"
    trust = "" if verdict.trusted else f"\ntrusted: false ({why})"
    if verdict.accepted and reward == 0 and not verdict.cached:
        trust += f"\nno reward: the frontier is at {episode.tier.format(episode.best)} already"
    return (
        f"{verdict.submission}:{claimed} {verdict.reason}. {timing_text(verdict)}"
        f"{verdict.n} rerun(s){loss}, {verdict.device_seconds:.1f} device_seconds.{cached}{audit}{flags}{trust}\n"
        f"reward {reward:+.4f}, recovered {episode.recovered:.4f}"
    )


def audit_text(audit: Audit) -> str:
    return (
        f"audit of {audit.positions} positions: loss {audit.audited_loss:.4f} +- {audit.uncertainty:.4f}, "
        f"max |D| {audit.max_abs_d:.1e}, mean D {audit.mean_d:+.1e}"
    )


def timing_text(verdict: Verdict) -> str:
    if verdict.time is None:
        return ""
    t = verdict.time
    return f"Time: {t.seconds:.2f} s, {t.ratio:.3f} of the start record's, at most {t.bound:.3f}. "


def state_text(episode: Episode) -> str:
    """Frontier, budget, last verdict: what `render` prints."""
    e = episode
    of, span = e.tier.format, e.span
    lines = [
        f"{e.tier.name}: start {span.start} {of(span.start_value)}, anchor {span.anchor} {of(span.anchor_value)}, "
        f"target {e.tier.table.training.target:g} nats",
        f"frontier: {of(e.best)} ({e.frontier.name}), recovered {e.recovered:.4f}",
    ]
    for meter, s in e.budget.status().items():
        lines.append(f"  {meter}: {s['spent']:.4g} of {s['limit']:.4g} spent")
    lines.append(f"  verification_device_seconds: {e.budget.verification_device_seconds:.1f}")
    if e.active:
        lines.append("running: " + ", ".join(r.handle for r in e.active))
    if e.verdicts:
        v = e.verdicts[-1]
        claim = "" if v.claim is None else f" claim {v.claim}"
        lines.append(f"last verdict: {v.submission}{claim}: {v.reason} (n = {v.n})")
    if e.over:
        lines.append(f"over: {e.over}")
    return "\n".join(lines)


def last_losses(runs: list[RunResult], shard: str) -> tuple[float, float]:
    """(validation, training) loss of the last completed run; zeros before one."""
    if not runs:
        return 0.0, 0.0
    train = runs[-1].train_losses  # none on the wallclock track: training code tells no loss that counts
    return runs[-1].val_losses[shard], train[-1] if train else 0.0
