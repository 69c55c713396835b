#!/usr/bin/env bash
# Guess: a model of stable-baselines3 that is saved, loaded and trained on meets new episodes, as it would have without
#   the break. The seed of its constructor says how the run began.
# What happens: the seed is saved with the model, and load() seeds again with it: the environments, and the global
#   generators of random, numpy and torch. So each part of a run that is trained in parts begins with the same
#   episodes, in the same order, however many parts there are. num_timesteps does go on, so the curve looks whole. Only
#   seed=None is free of it. load() for an evaluation or a second player restarts the generators of a running process,
#   too. The documentation of load() does not say so.
# Versions: stable-baselines3 2.9.2, gymnasium 1.4.0, torch 2.13.0.
# Why it matters here: where an episode is one question, a run in ten parts sees a tenth of its questions ten times. The
#   reward rises on them, and the seed was set to be exact. Load with another seed for each part,
#   PPO.load(path, env, seed=...). rl.py makes each step's hands from seed and step.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 stable-baselines3==2.9.2
"$folder/venv/bin/python" -W ignore - "$folder/model" <<'PYTHON'
import sys
import gymnasium, stable_baselines3, torch
from stable_baselines3 import PPO

class Ask(gymnasium.Env):
    """Each episode is one of 100,000 questions, and one answer."""
    observation_space, action_space = gymnasium.spaces.Box(0, 1, (1,)), gymnasium.spaces.Discrete(4)
    asked = []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.question = int(self.np_random.integers(100_000))
        self.asked.append(self.question)
        return [self.question / 100_000], {}

    def step(self, action):
        return [0.0], float(action == self.question % 4), True, False, {}

def train(seed, **options):
    """Questions of a run in four parts of 64 steps, and the first number that torch draws behind each load()."""
    model = PPO("MlpPolicy", Ask(), n_steps=32, batch_size=32, n_epochs=1, seed=seed, device="cpu")
    parts, drawn = [], []
    for part in range(4):
        Ask.asked.clear()
        model.learn(64, reset_num_timesteps=False)
        parts.append(Ask.asked[:64])
        model.save(sys.argv[1])
        model = PPO.load(sys.argv[1], Ask(), device="cpu", **({"seed": 100 + part} if options else {}))
        drawn.append(torch.rand(1).item())
    different = len(set(sum(parts, []))), len(set(drawn))
    print(f"questions of the parts begin {[part[:2] for part in parts]};", model.num_timesteps, "steps,", different[0],
          "questions;", different[1], "different numbers drawn")
    return different

print("stable-baselines3", stable_baselines3.__version__, "torch", torch.__version__)
print("seed=0; seed=0 and another one for each load(); seed=None:")
same, other, free = train(0), train(0, anew=True), train(None)
still = same == (64, 1) and min(other[0], free[0]) > 250 and other[1] == free[1] == 4
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
