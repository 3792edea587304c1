"""Judges that say what they are told to, and environments where they sit."""

from pathlib import Path

from fakes import FakeBackend

from nanogpt_env.content import content_root
from nanogpt_env.judging import read_rules
from nanogpt_env.tables import JudgeSeat
from nanogpt_env.types import Finding, Opinion

BOOK = content_root() / "judges" / "rulebook"
HELD_OUT = Path(__file__).parent / "held_out_cases"


class Told:
    """A judge that says what it is told to, and keeps what it was given."""

    name = "told"

    def __init__(self, outcome="pass", fails="", reached=False):
        self.outcome, self.fails, self.reached, self.given = outcome, fails, reached, []

    def rules(self, material):
        return read_rules(BOOK / "rules.toml").of(material.track, material.model_rule)

    def judge(self, material):
        self.given.append(material)
        if self.fails:
            raise RuntimeError(self.fails)
        found = (Finding(rule="data", file="optimizer.py", line=2),) if self.outcome == "break" else ()
        detail = "the line is dead" if self.outcome == "unavailable" else ""
        spent = {"input_tokens": 90, "output_tokens": 10, "reached": self.reached}
        return Opinion(judge="x", outcome=self.outcome, findings=found, detail=detail, **spent)


class Obeys:
    """A judge that does what the program tells it, which is to approve."""

    name = "obedient"

    def rules(self, material):
        return None

    def judge(self, material):
        return Opinion(judge=self.name, outcome="pass")


def seated(make, judge, mode="veto", backend=None, **seat):
    env = make(backend or FakeBackend(), judges=[JudgeSeat(name="static", mode=mode, **seat)])
    env.panel.judges[:] = [judge]
    return env
