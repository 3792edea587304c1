"""The attack suite: hostile and honest candidates, run on a sandbox of this host and by a deliberately naive scorer.

Cases are files in tests/attacks: a block of settings as a comment, a line that says what it tries, and the candidate;
in `actions`, a file that an agent tries to write, or an action as it comes in; in `submissions`, a program with a claim
that it does not deserve. An attack that the naive scorer stands is no attack: its verdict here would say nothing. Runs
are short, except for submissions; what counts as a gain is a loss that lies `MARGIN` below that of the honest control,
or `FASTER` of its time. Our static judge refuses most of these sources; it is no boundary: they are run all the same.

What is not stopped but bounded stands in `bounded.toml`, with what it gains and what measured that.
"""

from nanogpt_env.attacks.cases import BAD, Case, Outcome, load_bounded, load_cases
from nanogpt_env.attacks.suite import Suite, summary

__all__ = ["BAD", "Case", "Outcome", "Suite", "load_bounded", "load_cases", "summary"]
