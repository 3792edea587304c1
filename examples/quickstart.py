"""One episode by hand: edit the start record, train it, submit it, print the reward."""

import gymnasium

from nanogpt_env import EditFile, Run, Submit

env = gymnasium.make("nanogpt_env:NanoGPT/Speedrun-v0", tier="nano-steps")
observation, info = env.reset()
cooldown = "2 * LEARNING_RATE * min(2 * (horizon - step) / horizon, 1.0,"
env.step(EditFile(path="optimizer.py", old="LEARNING_RATE * min(1.0,", new=cooldown))
observation, reward, terminated, truncated, info = env.step(Run(horizon=230))
print(observation["text"])
observation, reward, terminated, truncated, info = env.step(Submit(claim=226, horizon=230))
print(observation["text"], reward)
env.close()
