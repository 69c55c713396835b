#!/usr/bin/env bash
# Guess: d3rlpy learns from each step that was played or that stands in a dataset. Whether an episode was over or cut
#   off by a time limit decides about the value behind its last step, not about the step.
# What happens: the last step of an episode that was cut off is kept in the episode and never sampled as a transition:
#   no state behind it is stored. So its action and reward are lost to Q-learning. fit_online() was given that state
#   by the environment, and drops it. Where the reward comes with the last step, every reward in training is 0, while
#   compute_return() is right. There is no warning, and the docstring of MDPDataset does not say it.
# Versions: d3rlpy 2.8.1, gymnasium 1.0.0, torch 2.13.0.
# Why it matters here: a conversation is paid when it ends, and a limit on its turns is often what ends it. Give ends
#   that are paid for as terminals, and compare transition_count with the number of steps before a run.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 gymnasium==1.0.0 d3rlpy==2.8.1
"$folder/venv/bin/python" -W ignore - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
from importlib.metadata import version
import logging
import gymnasium, numpy as np, structlog
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
from d3rlpy.algos import DQNConfig
from d3rlpy.dataset import MDPDataset, create_fifo_replay_buffer
from d3rlpy.logging import NoopAdapterFactory

class Four(gymnasium.Env):
    """Episodes of four steps with a reward of 1 at the end, which is of the given kind."""
    observation_space, action_space = gymnasium.spaces.Box(0, 1, (1,)), gymnasium.spaces.Discrete(2)

    def __init__(self, end):
        self.end = end

    def reset(self, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        ends = [self.steps == 4 and self.end == kind for kind in ("terminated", "truncated")]
        return np.full(1, self.steps / 4, np.float32), float(any(ends)), *ends, {}

def look(name, data):
    episodes = [round(float(sum(episode.compute_return() for episode in data.episodes)), 1), data.transition_count]
    sampled = float(data.sample_transition_batch(2000).rewards.max())
    print(f"{name:32}: sum of rewards {episodes[0]}, transitions {episodes[1]}, largest reward sampled {sampled}")
    return episodes + [sampled]

print(*(f"{name} {version(name)}" for name in ("d3rlpy", "gymnasium", "torch")))
seen = []
for end in ("terminated", "truncated"):
    buffer = create_fifo_replay_buffer(limit=1000, env=Four(end))
    DQNConfig().create(device="cpu").fit_online(Four(end), buffer, n_steps=80, update_start_step=1000,
                                                logger_adapter=NoopAdapterFactory(), show_progress=False)
    flags, zeros = np.tile([0.0, 0, 0, 1], 20), np.zeros((80, 1), np.float32)
    ends = {"terminals": flags} if end == "terminated" else {"terminals": zeros[:, 0], "timeouts": flags}
    seen.append(look(f"fit_online, 80 steps, {end}", buffer))
    seen.append(look(f"MDPDataset, 80 steps, {end}", MDPDataset(zeros, np.arange(80) % 2, flags, **ends)))
raise SystemExit(0 if seen == [[20, 80, 1]] * 2 + [[20, 60, 0]] * 2 else f"the behaviour has changed: {seen}")
PYTHON
