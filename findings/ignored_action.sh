#!/usr/bin/env bash
# Guess: each step() of a vector of environments judges one action per environment. An episode that is over begins anew
#   within the same step, so a policy that is always right has a mean reward of 1 where each right answer pays 1.
# What happens: since gymnasium 1.0 the new episode begins with the NEXT step. That step ignores the action, and gives
#   the reward 0, "not over" and the info of reset(): nothing marks it. So with one question per episode every second
#   answer is never judged, and the mean reward of a perfect policy is 0.5. With five turns it is every sixth answer.
#   The observation that the ignored answer was sampled from is the last one of the episode before.
# Versions: gymnasium 1.4.0, numpy 2.4.6. gym.make_vec(), SyncVectorEnv and AsyncVectorEnv do the same.
# Why it matters here: questions to a language model are short episodes, so a large share of a PPO batch can be answers
#   without a consequence, and the value behind an episode's end is bootstrapped from the next question. Pass
#   autoreset_mode=AutoresetMode.SAME_STEP and read the last observation from info["final_obs"], or mask the steps that
#   follow an end. This repository steps its environments one by one.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile gymnasium==1.4.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import gymnasium
import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

class Quiz(gymnasium.Env):
    """Say the digit that is shown. turns: questions per episode."""
    observation_space = action_space = Discrete(10)

    def __init__(self, turns):
        self.turns = turns

    def ask(self):
        self.digit = int(self.np_random.integers(10))
        return self.digit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.turns
        return self.ask(), {}

    def step(self, action):
        reward, self.left = float(action == self.digit), self.left - 1
        return self.ask(), reward, self.left == 0, False, {}

print("gymnasium", gymnasium.__version__, "numpy", np.__version__)
seen = {}
for turns in (1, 5):
    for name, options in (("default", {}), ("SAME_STEP", {"autoreset_mode": AutoresetMode.SAME_STEP})):
        envs = SyncVectorEnv([lambda: Quiz(turns)] * 4, **options)
        shown, _ = envs.reset(seed=0)
        rewards = []
        for _ in range(60):
            shown, reward, *_ = envs.step(shown)  # a policy that is always right
            rewards.append(reward)
        seen[turns, name] = round(float(np.mean(rewards)), 3)
        print(f"{turns} turns an episode, {name:9}: rewards of the first environment "
              f"{[int(r[0]) for r in rewards[:12]]}, mean {seen[turns, name]}")
still = seen == {(1, "default"): 0.5, (1, "SAME_STEP"): 1.0, (5, "default"): 0.833, (5, "SAME_STEP"): 1.0}
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
