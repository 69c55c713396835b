#!/usr/bin/env bash
# Guess: in reasoning-gym a task whose answer is one number, a product, a sum, a greatest common divisor, pays 1 for
#   that number and 0 for another one, or less the further it is away.
# What happens: the scorer that most tasks inherit compares texts. An answer that is not equal but contains the right
#   one gets the share of its characters that the right one has. So a number with one digit too many, in front or
#   behind, or with the wrong sign, is paid: .85 for ten times a product of six digits, .5 for -7 or 71 in place of
#   7. The neighbouring number gets 0. The share grows with the length of the numbers: the harder the task, the better
#   the wrong answer is paid.
# Versions: reasoning-gym 0.1.25.
# Why it matters here: RL learns from the reward alone. A model that repeats a digit is paid most of what a right one
#   gets, and a mean reward of .8 need not hold one right answer. Report the share of answers with a score of exactly
#   1 beside it, and train on that, as verifier.py does: a right answer or none.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile reasoning-gym==0.1.25
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
import reasoning_gym

ways = {"right": str, "times 10": lambda x: f"{x}0", "a 1 in front": lambda x: f"1{x}", "negative": lambda x: f"-{x}",
        "plus 1": lambda x: str(int(x) + 1)}
print("reasoning-gym", version("reasoning-gym"))
means = {}
for task in ("products", "chain_sum", "lcm", "simple_equations", "gcd", "letter_counting"):
    dataset = reasoning_gym.create_dataset(task, size=50, seed=1)
    entries = [entry for entry in dataset if entry["answer"].isdigit()]
    digits = sum(len(entry["answer"]) for entry in entries) / len(entries)
    scores = {way: [dataset.score_answer(answer=change(entry["answer"]), entry=entry) for entry in entries]
              for way, change in ways.items()}
    means[task] = {way: sum(x) / len(x) for way, x in scores.items()}
    print(f"{task}, {digits:.1f} digits:", "; ".join(f"{way} {x:.2f}" for way, x in means[task].items()))
kept = all(m["right"] == 1 and min(m["times 10"], m["a 1 in front"], m["negative"]) > 0.4 and m["plus 1"] < 0.1
           for m in means.values())
raise SystemExit(0 if kept and means["products"]["times 10"] > 0.8 else f"the behaviour has changed: {means}")
PYTHON
