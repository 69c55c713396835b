#!/usr/bin/env bash
# Guess: torch.manual_seed() takes 64 bits, and two different seeds give two different streams of random numbers.
# What happens: on the CPU only the lower 32 bits count. Seeds 7, 2**32 + 7 and 5 * 2**32 + 7 give the same stream, and
#   so do -1 and 2**32 - 1. The generator keeps the whole number: initial_seed() tells the three apart. No warning
#   comes. Python's and NumPy's generators use all bits of such a seed.
# Versions: torch 2.13.0, on the CPU.
# Why it matters here: "seed << 32 | step" and "seed * 2**32 + rank" are usual ways to give each step or rank a seed of
#   its own. Here they leave out the run's seed: the five seeds of a study sample with the same numbers, and its error
#   bars are too small. Hash the parts and keep 31 or 32 bits, as sft.py and rl.py do with random.Random(text).
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import random
import numpy, torch

def by_torch(seed):
    torch.manual_seed(seed)
    return torch.rand(4).tolist(), torch.randperm(9).tolist(), torch.multinomial(torch.ones(50), 9).tolist()

draws = {"torch": by_torch, "random": lambda seed: random.Random(seed).random(),
         "numpy": lambda seed: numpy.random.default_rng(seed).random()}
print("torch", torch.__version__, "numpy", numpy.__version__)
seeds = [run << 32 | 7 for run in range(5)]  # five runs at step 7
different = {}
for name, draw in draws.items():
    different[name] = len({str(draw(seed)) for seed in seeds})
    print(f"{name:6} five runs, each with seed << 32 | step: {different[name]} different streams")
kept = [torch.Generator().manual_seed(seed).initial_seed() for seed in seeds]
print("initial_seed() of the five:", kept)
parts = [random.Random(f"{run}/7").randrange(2 ** 31) for run in range(5)]
hashed = len({str(by_torch(seed)) for seed in parts})
print("torch  five runs, each with 31 bits of a hash:", hashed, "different streams")
still = different == {"torch": 1, "random": 5, "numpy": 5} and kept == seeds and hashed == 5
raise SystemExit(0 if still and by_torch(-1) == by_torch(2 ** 32 - 1) else "the behaviour has changed")
PYTHON
