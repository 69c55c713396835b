#!/usr/bin/env bash
# Guess: model.gamma = 0.9 changes the discount of a stable-baselines3 PPO from there on, as model.ent_coef = 0.01 and
#   model.n_epochs = 4 do for theirs. A callback may so anneal each of them.
# What happens: gamma, gae_lambda and learning_rate are copied when the model is made: into the rollout buffer, and into
#   a schedule. The attribute is written, read back and saved, and learn() goes on with the old value. But load()
#   builds the copies anew from the attributes. So the value that was ignored takes effect with the next resume: the
#   run without a break and the resumed one optimise different returns. (clip_range raises.)
#   gamma is used half: the value behind a time limit is discounted by the attribute, all other ones by the copy.
# Versions: stable-baselines3 2.9.2, gymnasium 1.4.0, torch 2.13.0. A2C does the same.
# Why it matters here: a sweep that makes one model and sets model.gamma for each run compares equal runs, and its
#   table shows only noise. And a run that is split in two is not the run. Pass the values to PPO.load(path, env,
#   gamma=...), or set model.rollout_buffer.gamma and .gae_lambda, and model.lr_schedule, as well.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 stable-baselines3==2.9.2
"$folder/venv/bin/python" -W ignore - "$folder/model" <<'PYTHON'
import sys
import gymnasium, stable_baselines3, torch
from stable_baselines3 import A2C, PPO

class Eight(gymnasium.Env):
    """Episodes of eight steps, with a reward of 1 at the end."""
    observation_space, action_space = gymnasium.spaces.Box(0, 1, (1,)), gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.steps = 0
        return [0.0], {}

    def step(self, action):
        self.steps += 1
        return [self.steps / 8], float(self.steps == 8), self.steps == 8, False, {}

def train(model):
    """A batch of two episodes -> the first state's value target, learning rate, updates of the policy's weights."""
    before = model._n_updates
    model.learn(16, reset_num_timesteps=False)
    rate = model.policy.optimizer.param_groups[0]["lr"]
    return round(model.rollout_buffer.returns[0, 0].item(), 3), rate, model._n_updates - before

print("stable-baselines3", stable_baselines3.__version__, "torch", torch.__version__)
seen = {}
for algorithm, options in ((PPO, {"batch_size": 16, "n_epochs": 2}), (A2C, {})):
    epochs = [("n_epochs", 5)] if algorithm is PPO else []  # A2C has one
    for name, value in [(None, 0), ("gamma", 0.5), ("gae_lambda", 0.0), ("learning_rate", 0.1)] + epochs:
        torch.manual_seed(0)
        model = algorithm("MlpPolicy", Eight(), n_steps=16, gamma=0.99, gae_lambda=1.0, learning_rate=1e-4,
                          device="cpu", **options)
        if name:
            setattr(model, name, value)
        model.save(sys.argv[1])
        here, resumed = train(model), train(algorithm.load(sys.argv[1], Eight(), device="cpu"))
        seen[algorithm.__name__, name] = here, resumed
        print(f"{algorithm.__name__} {f'{name} = {value}' if name else 'as it was made':19} (target, rate, updates): "
              f"goes on {here}, saved and loaded {resumed}")
still = all(seen[a, None][0] == seen[a, None][1] == here and here != resumed if n not in (None, "n_epochs") else
            here == resumed for (a, n), (here, resumed) in seen.items())
still = still and seen["PPO", "n_epochs"][0][2] == 5 and seen["PPO", None][0][2] == 2
raise SystemExit(0 if still else f"the behaviour has changed: {seen}")
PYTHON
