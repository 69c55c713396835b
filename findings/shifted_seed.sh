#!/usr/bin/env bash
# Guess: two seeds give two sets of questions, as different as chance makes them. So seed 42 for training and seed 43
#   for the test is a split.
# What happens: reasoning-gym makes question i of a set by random.Random(seed + i). So question i of seed 43 is
#   question i + 1 of seed 42: of 100 test questions 99 are the training set's, word for word. Most of its generators
#   work so; gsm_symbolic does not. There is no warning, and a look at the first question of each set shows two
#   different ones.
# Versions: reasoning-gym 0.1.25.
# Why it matters here: ID is measured on hands that were not trained on. With such a split it would measure memory, and
#   a run that takes seed + 1 for each epoch meets one new question an epoch. Set the seeds further apart than the sets
#   are long, or cut one set in two, and count the questions that both have. This repository seeds by strings with the
#   split's name, "rl/..." and "eval/...", and holds hands out.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile reasoning-gym==0.1.25 sympy==1.14.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
import reasoning_gym

def questions(name, seed, size=100):
    return [row["question"] for row in reasoning_gym.create_dataset(name, seed=seed, size=size)]

print("reasoning-gym", version("reasoning-gym"))
shared = {}
for name in ("chain_sum", "countdown", "leg_counting", "gsm_symbolic"):
    train = questions(name, 42)
    for seed in (43, 52, 142):
        test = questions(name, seed)
        shared[name, seed] = sum(q in train for q in test)
        moved = sum(a == b for a, b in zip(train[seed - 42:], test))
        print(f"{name:13} trained on seed 42: of 100 questions of seed {seed:3} {shared[name, seed]:2} are known, "
              f"{moved} of them {seed - 42} places further on")
still = all(shared[name, 43] >= 99 and shared[name, 52] >= 90 and shared[name, 142] < 20
            for name in ("chain_sum", "countdown", "leg_counting"))
raise SystemExit(0 if still and shared["gsm_symbolic", 43] < 20 else "the behaviour has changed")
PYTHON
