#!/usr/bin/env bash
# Guess: gymnasium's NormalizeReward divides rewards by a running deviation of the discounted return, and a return
#   belongs to one episode. Whether an episode is over or was cut off by a time limit makes no difference to the scale.
# What happens: the running return starts anew only where an episode TERMINATED. Behind a truncated one it goes on into
#   the next, as reset() does not touch it. Where all episodes end by a time limit it is one return of the whole
#   training: with a reward of 1 a step and 5 steps an episode it grows to 1 / (1 - gamma) = 100 in place of 5, and
#   each reward counts a tenth of what it counts in the same episodes that terminate. NormalizeReward for
#   vectors of environments does the same.
# Versions: gymnasium 1.4.0.
# Why it matters here: TimeLimit, or a number of attempts that is reported as truncation, then changes the size of the
#   rewards, and with it the weight of the reward against a KL penalty or an entropy bonus. Nothing is printed and no
#   value is wrong by itself. Divide by a constant that is known (reward_scale here), or whiten advantages per batch.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile gymnasium==1.4.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
import gymnasium
from gymnasium.wrappers import NormalizeReward
from gymnasium.wrappers.vector import NormalizeReward as NormalizeRewards

class Five(gymnasium.Env):
    """Episodes of five steps, each with a reward of 1. They end in one of the two ways."""
    observation_space = action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, terminates):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return 0, {}

    def step(self, action):
        self.steps += 1
        over = self.steps == 5
        return 0, 1.0, over and self.terminates, over and not self.terminates, {}

def single(terminates):
    env = NormalizeReward(Five(terminates), gamma=0.99)
    for _ in range(400):
        env.reset()
        reward = [env.step(0)[1] for _ in range(5)][-1]
    return float(reward)

def vector(terminates):
    env = NormalizeRewards(gymnasium.vector.SyncVectorEnv([lambda: Five(terminates)]), gamma=0.99)
    env.reset()
    return [env.step([0])[1] for _ in range(400 * 6 - 1)][-1].item()  # each sixth step only resets

print("gymnasium", version("gymnasium"))
seen = []
for name, play in (("one environment", single), ("vector", vector)):
    ends, cut = play(True), play(False)
    seen.append(ends > 3 * cut)
    print(f"{name}: a reward of 1 in episode 400 is {ends:.3f} if episodes terminate, {cut:.3f} if they are cut off")
raise SystemExit(0 if seen == [True, True] else f"the behaviour has changed: {seen}")
PYTHON
