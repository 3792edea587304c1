"""One episode by hand: edit the start record, train it, submit it, print the reward."""

import gymnasium

from nanogpt_env import EditFile, Run, Submit

env = gymnasium.make("nanogpt_env:NanoGPT/Speedrun-v0", tier="nano-steps")
observation, info = env.reset()
env.step(EditFile(path="optimizer.py", old="/ WARMUP_STEPS)", new="/ WARMUP_STEPS, 2 * (horizon - step) / horizon)"))
observation, reward, terminated, truncated, info = env.step(Run(horizon=240))
print(observation["text"])
observation, reward, terminated, truncated, info = env.step(Submit(claim=236, horizon=240))
print(observation["text"], reward)
env.close()
