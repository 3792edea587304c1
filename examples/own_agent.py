"""An agent of one's own: docs/agents.md. `python examples/own_agent.py` plays it, some two minutes."""

from nanogpt_env import Run, Stop, Submit, WriteFile
from nanogpt_env.agents import play
from nanogpt_env.env import Speedrun


class WithCooldown:
    """Lets the learning rate fall in the second half of the schedule, and has that verified."""

    def __init__(self, tier):
        source = tier.record(tier.table.reward.start).sources["optimizer.py"]
        warm_up = "(step + 1) / WARMUP_STEPS"
        source = source.replace("= 4e-3", "= 1e-2").replace(warm_up, f"{warm_up}, 2 - 2 * step / horizon")
        self.actions = [WriteFile(path="optimizer.py", text=source), Run(horizon=215)]

    def act(self, observation, info):
        if self.actions:
            return self.actions.pop(0)
        if info.get("run", {}).get("done") and info["budget"]["submissions"]["spent"] == 0:
            return Submit(claim=215, horizon=215)
        return Stop()


if __name__ == "__main__":
    env = Speedrun("nano-steps")
    played = play(env, WithCooldown(env.tier))
    accepted = [v["submission"] for v in played.verdicts if v["accepted"]]
    print(f"accepted {accepted}, recovered {played.info['recovered']:.2f}")
    env.close()
