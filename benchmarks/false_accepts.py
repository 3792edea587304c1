"""False accepts, power and rerun counts of sequential verification, beside fixed reruns.

Everything is in units of the tier's sigma. F10 is ten fixed reruns and a one-sided t test; the
naive design repeats that t test after each of 2..14 reruns. Losses are Gaussian, or residuals of
real reruns (group mean taken out, scaled to sd 1, drawn with replacement).

    python benchmarks/false_accepts.py --reruns reruns.csv
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import special

from nanogpt_env.stats import (
    BoolArray,
    FloatArray,
    IntArray,
    SequentialTest,
    Simulation,
    boundary_constant,
    decide_paths,
    margin_for_power,
)

N_MAX = 14
LOOKS = [("n_min 3, level .01", 3, 0.01), ("n_min 5, level .01", 5, 0.01)]
LOOKS += [("n_min 5, level .01/8", 5, 0.01 / 8)]
SDS = [1 / 3, 1 / 2, 11 / 13, 1.0, 2.0, 3.0]
MARGINS = [-8.0, 0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 8.0]
CHUNK = 100_000
HUMAN_SIGMA = 0.0013
# The mix of candidates: shares and ranges of margin, in nats at the human sigma.
MIX = [(0.7, -0.015, -0.002), (0.2, -0.001, 0.001), (0.1, 0.0015, 0.005)]
MIX_SD = (14, 0.00128 / HUMAN_SIGMA)  # sd ** 2 ~ s0 ** 2 * d0 / chi2(d0), fitted to the same reruns
SCREEN = 0.004 / HUMAN_SIGMA  # "drop it if run 1 is this far above the target"

INTRODUCTION = """# False accepts, power and reruns of sequential verification

Written by `benchmarks/false_accepts.py`. Margins and sds are in units of the tier's sigma; every
number carries one standard error, and "0" means none of the paths. F10 is ten fixed reruns and a t
test at the same level; "naive peeking" repeats that test after each of 2..14 reruns; neither
depends on the sd. Real residuals: group mean taken out, scaled to sd 1, drawn with replacement.

"""

Design = Callable[[FloatArray], tuple[BoolArray, IntArray]]
Sampler = Callable[[np.random.Generator, int], FloatArray]


def t_accepts(losses: FloatArray, n: int, level: float) -> BoolArray:
    x = losses[:, :n]
    with np.errstate(divide="ignore", invalid="ignore"):  # a residual drawn twice has sd 0
        t = -x.mean(axis=1) * math.sqrt(n) / x.std(axis=1, ddof=1)
    return np.asarray(t >= -special.stdtrit(n - 1, level))


def fixed_ten(level: float, screen: float = math.inf) -> Design:
    def decide(losses: FloatArray) -> tuple[BoolArray, IntArray]:
        dropped = losses[:, 0] > screen
        return t_accepts(losses, 10, level) & ~dropped, np.where(dropped, 1, 10)

    return decide


def naive(level: float) -> Design:
    def decide(losses: FloatArray) -> tuple[BoolArray, IntArray]:
        accepted, n = np.zeros(len(losses), dtype=bool), np.full(len(losses), N_MAX)
        for look in range(2, N_MAX + 1):
            now = ~accepted & t_accepts(losses, look, level)
            n[now] = look
            accepted |= now
        return accepted, n

    return decide


def gaussian(rng: np.random.Generator, paths: int) -> FloatArray:
    return rng.standard_normal((paths, N_MAX))


def resampled(residuals: FloatArray) -> Sampler:
    return lambda rng, paths: rng.choice(residuals, (paths, N_MAX))


def real_residuals(path: Path) -> Iterator[tuple[str, FloatArray, int]]:
    """Name, unit-variance residuals and group count of each track with runs of identical code."""
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["duplicate_of"] or not row["code_hash"]:
                continue
            key = (row["track"], row["record_folder"], row["code_hash"], row["total_steps"])
            groups[key].append(float(row["final_val_loss"]))
    for track in ("3", "1"):
        samples = [np.array(x) for key, x in groups.items() if key[0] == track and len(x) >= 5]
        # Taking out the group's own mean shrinks the residuals by sqrt(1 - 1/n).
        scaled = [(x - x.mean()) / (x.std(ddof=1) * math.sqrt(1 - 1 / len(x))) for x in samples]
        yield f"track {track} residuals", np.concatenate(scaled), len(samples)


@dataclass(frozen=True)
class Row:
    """One measured number: `kind` is a margin in sigmas, or a class of the mix."""

    looks: str
    check: str
    noise: str
    sd: float | None
    kind: float | str
    design: str
    result: Simulation

    def rate(self) -> str:
        rate, se = self.result.accept_rate, self.result.accept_se
        if rate == 0:
            return "0"
        return f"{rate:.5f} ± {se:.5f}" if rate >= 1e-4 else f"{rate:.1e} ± {se:.1e}"

    def reruns(self) -> str:
        return f"{self.result.mean_n:.3f} ± {self.result.mean_n_se:.3f}"


def measure(design: Design, noise: Sampler, margin: float, sd: float, paths: int) -> Simulation:
    rng = np.random.default_rng(1)
    accepted, n = [], []
    for start in range(0, paths, CHUNK):
        part = design(sd * noise(rng, min(CHUNK, paths - start)) - margin)
        accepted.append(part[0])
        n.append(part[1])
    return Simulation.of(np.concatenate(accepted), np.concatenate(n))


def measure_mix(design: Design, paths: int) -> dict[str, Simulation]:
    """Each class of candidate, then the whole mix."""
    rng = np.random.default_rng(2)
    kind = rng.choice(len(MIX), size=paths, p=[share for share, _, _ in MIX])
    low, high = (np.array(MIX)[kind, i] / HUMAN_SIGMA for i in (1, 2))
    margin = rng.uniform(low, high)[:, None]
    d0, s0 = MIX_SD
    sd = s0 * np.sqrt(d0 / rng.chisquare(d0, paths))[:, None]
    accepted, n = design(sd * gaussian(rng, paths) - margin)
    rows = {name: kind == i for i, name in enumerate(("bad", "near", "good"))}
    rows["mix"] = np.ones(paths, dtype=bool)
    return {name: Simulation.of(accepted[mask], n[mask]) for name, mask in rows.items()}


def study(looks: str, test: SequentialTest, noises: dict[str, Sampler], paths: int) -> list[Row]:
    sequential: Design = functools.partial(decide_paths, test)
    designs = {"sequential": sequential, "F10": fixed_ten(test.level)}
    designs["naive peeking"] = naive(test.level)
    rows = []
    for noise, sampler in noises.items():
        for sd in SDS:
            for name, design in designs.items():
                if name != "sequential" and sd != 1.0:
                    continue  # a t test without a floor does not depend on the sd
                result = measure(design, sampler, 0.0, sd, paths)
                rows.append(Row(looks, "false accepts", noise, sd, 0.0, name, result))
    for margin in MARGINS:
        for name, design in designs.items():
            result = measure(design, gaussian, margin, 1.0, CHUNK)
            rows.append(Row(looks, "power", "Gaussian", 1.0, margin, name, result))
    designs["F10, one-run screen"] = fixed_ten(test.level, SCREEN)
    for name, design in designs.items():
        for kind, result in measure_mix(design, paths).items():
            rows.append(Row(looks, "mix", "Gaussian", None, kind, name, result))
    return rows


def table(header: list[str], lines: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def render(rows: list[Row], paths: int) -> str:
    """Tables of one design: false accepts, power, mix."""
    at = {(r.check, r.noise, r.sd, r.kind, r.design): r for r in rows}
    names = ["sequential", "F10", "naive peeking"]
    lines = []
    for noise, sd in dict.fromkeys((r.noise, r.sd) for r in rows if r.check == "false accepts"):
        cells = [at.get(("false accepts", noise, sd, 0.0, name)) for name in names]
        lines.append([noise, f"{sd:.3f}", *(row.rate() if row else "" for row in cells)])
    text = f"False accepts at margin 0, {paths} paths a rate:\n\n"
    text += table(["noise", "sd", *names], lines)
    lines = []
    for margin in MARGINS:
        power = [at["power", "Gaussian", 1.0, margin, name] for name in names]
        lines.append([f"{margin:+g}", *(f"{r.rate()}; n {r.reruns()}" for r in power)])
    text += f"\nPower and mean reruns n, Gaussian noise of sd 1, {CHUNK} paths a rate:\n\n"
    text += table(["margin", *names], lines) + "\n"
    lines = []
    for name in [*names, "F10, one-run screen"]:
        mix = [at["mix", "Gaussian", None, kind, name] for kind in ("bad", "near", "good", "mix")]
        lines.append([name, *(f"{r.reruns()}; accepts {r.rate()}" for r in mix)])
    text += f"Mean reruns and share accepted on the mix of candidates, {paths} paths in all:\n\n"
    return text + table(["design", "bad (70 %)", "near (20 %)", "good (10 %)", "mix"], lines)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--reruns", type=Path, required=True, help="CSV with one line per real run")
    parser.add_argument("--paths", type=int, default=400_000, help="per false-accept rate")
    parser.add_argument("--calibration-paths", type=int, default=40_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    started = time.perf_counter()

    noises: dict[str, Sampler] = {"Gaussian": gaussian}
    text, pools, designs, rows = INTRODUCTION, [], [], []
    for name, x, groups in real_residuals(args.reruns):
        noises[name] = resampled(x)
        skew, kurtosis = float(np.mean(x**3)), float(np.mean(x**4)) - 3
        pools.append({"name": name, "groups": groups, "runs": len(x), "skew": skew, "ex_kurtosis": kurtosis})
        text += f"- {name}: {len(x)} runs in {groups} groups of the same code, "
        text += f"skew {skew:+.2f}, excess kurtosis {kurtosis:+.2f}\n"

    for looks, n_min, level in LOOKS:
        constant, error = boundary_constant(level, n_min, N_MAX, paths=args.calibration_paths)
        boundary = math.ceil(1000 * (constant + 2 * error)) / 1000
        test = SequentialTest.for_tier(0.0, 1.0, level, n_min, N_MAX, boundary)
        margins = {f"{sd:.3f}": margin_for_power(test, sd) for sd in SDS}
        about = {"looks": looks, "level": level, "constant": constant, "constant_se": error}
        designs.append({**about, "boundary": boundary, "margin_for_power_.9": margins})
        measured = study(looks, test, noises, args.paths)
        rows += measured
        text += f"\n## {looks}\n\nC = {constant:.4f} ± {error:.4f} ({args.calibration_paths} paths)"
        text += f", used {boundary}. Margin for power .9 (200000 paths) by sd: "
        text += ", ".join(f"{m:.3f} at {sd}" for sd, m in margins.items()) + ".\n\n"
        text += render(measured, args.paths)

    results = [asdict(row) for row in rows]
    for result in (row["result"] for row in results):
        if math.isnan(result["mean_n_accepted"]):
            result["mean_n_accepted"] = None  # JSON has no nan
    record = {
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "seconds": round(time.perf_counter() - started, 1),
        "reruns_sha256": hashlib.sha256(args.reruns.read_bytes()).hexdigest(),
        "pools": pools,
        "designs": designs,
        "rows": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "false_accepts.md").write_text(text, encoding="utf-8")
    (args.out / "false_accepts.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
