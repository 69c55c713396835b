#!/usr/bin/env bash
# Guess: a PettingZoo environment that SuperSuit makes a vector of for stable-baselines3, as PettingZoo's tutorials do,
#   keeps its meaning: what it calls "truncated" is a time limit, and PPO takes the critic's value for what is behind.
# What happens: SuperSuit hands on "terminated or truncated", and leaves "TimeLimit.truncated" out of the info, the one
#   sign by which stable-baselines3 knows a time limit. So each limit counts as a real end, and the value of the state
#   behind it as 0. terminal_observation is there, and unused. There is no warning.
# Versions: supersuit 3.11.0, pettingzoo 1.27.0, stable-baselines3 2.9.2, gymnasium 1.4.0, torch 2.13.0.
# Why it matters here: two players who talk in turns are such an environment, and a limit on their turns is its most
#   frequent end. A state near the limit then looks like a bad one. Put "TimeLimit.truncated": truncated and not
#   terminated into each agent's info, in the environment or in a wrapper, as the control below does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 \
    stable-baselines3==2.9.2 pettingzoo==1.27.0 supersuit==3.11.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
import gymnasium, numpy, supersuit
from pettingzoo import ParallelEnv
from stable_baselines3 import PPO

class Two(ParallelEnv):
    """Two agents, a reward of 1 a step, an end after four steps, of the given kind. says: info has the sign."""
    possible_agents, metadata, render_mode = ["a", "b"], {"name": "two"}, None

    def __init__(self, end, says):
        self.end, self.says = end, says

    def observation_space(self, agent):
        return gymnasium.spaces.Box(0, 1, (1,))

    def action_space(self, agent):
        return gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.agents, self.steps = ["a", "b"], 0
        return {"a": numpy.zeros(1), "b": numpy.zeros(1)}, {"a": {}, "b": {}}

    def step(self, actions):
        self.steps += 1
        over, cut = (self.steps == 4 and self.end == kind for kind in ("terminated", "truncated"))
        self.agents = [] if over or cut else self.agents
        return [{agent: make() for agent in ("a", "b")} for make in (
            lambda: numpy.zeros(1), lambda: 1.0, lambda: over, lambda: cut,
            lambda: {"TimeLimit.truncated": cut} if self.says else {})]

print(*(f"{name} {version(name)}" for name in ("supersuit", "pettingzoo", "stable-baselines3", "gymnasium")))
seen = []
for end in ("terminated", "truncated"):
    for says in (False, True):
        vector = supersuit.pettingzoo_env_to_vec_env_v1(Two(end, says))
        env = supersuit.concat_vec_envs_v1(vector, 1, base_class="stable_baselines3")
        model = PPO("MlpPolicy", env, n_steps=8, gamma=0.9, gae_lambda=1.0, batch_size=16, device="cpu")
        model.policy.value_net.weight.data.zero_()
        model.policy.value_net.bias.data.fill_(10.0)  # a critic that says 10: a reward of 1 for ever, discounted
        seen.append([round(x, 1) for x in model.learn(16).rollout_buffer.returns[:4, 0].tolist()])
        print(f"{end:10} after four steps{', info with the sign' if says else '':20}: value targets {seen[-1]}")
right = [[3.4, 2.7, 1.9, 1.0]] * 3 + [[10.0] * 4]
raise SystemExit(0 if seen == right else f"the behaviour has changed: {seen}")
PYTHON
