#!/usr/bin/env bash
# Guess: a scorer for "make 24 of 4, 3, 9, 8" asks three things: that the formula is legal, that it has the hand's four
#   numbers, and that it is 24.
# What happens: reasoning-gym's puzzle24 asks for four numbers from 1 to 10, whichever they are, and cuts the value down
#   to an integer before it compares. So one formula, 6*4*1*1, is paid in full on every hand, and so is (10*10-1)/4,
#   which is 24.75. The hand is in the entry's metadata, and nothing reads it. The sibling countdown does compare the
#   numbers, and pays a twentieth where they are others.
# Versions: reasoning-gym 0.1.25 with sympy 1.14.0.
# Why it matters here: the 24 game is this repository's first task. RL on that reward can learn one constant answer. It
#   is paid on unseen hands and under any other rule as well, so ID and OOD look perfect, too. Score an answer against
#   other hands: a verifier that still pays does not read the hand. verifier.py compares the numbers, and computes in
#   fractions.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile reasoning-gym==0.1.25 sympy==1.14.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
import reasoning_gym

print(*(f"{name} {version(name)}" for name in ("reasoning-gym", "sympy")))
puzzle = reasoning_gym.create_dataset("puzzle24", seed=0, size=6)
countdown = reasoning_gym.create_dataset("countdown", seed=0, size=6)
entries = [puzzle[i] for i in range(6)]
for entry in entries[:2]:
    print(entry["question"].splitlines()[0])
answers = ("6*4*1*1", "10*5/2-1", "(10*10-1)/4", "10*9-8*8", "6*4")
paid = {}
for answer in answers:
    paid[answer] = [puzzle.score_answer(answer, entry) for entry in entries]
    print(f"{answer:12} pays {paid[answer]} on six hands")
hands = [sorted(entry["metadata"]["numbers"]) for entry in entries]
formulas = ([1, 1, 4, 6], [1, 2, 5, 10], [1, 4, 10, 10])
print("hands with the numbers of one of these formulas:", sum(hand in formulas for hand in hands))
rows = [countdown[i] for i in range(6)]
other = [countdown.score_answer(f"{row['metadata']['target']}*1*1*1", row) for row in rows]
print("countdown, the right value of other numbers:", other)
full = paid["6*4*1*1"] == paid["10*5/2-1"] == paid["(10*10-1)/4"] == [1.0] * 6
still = full and paid["6*4"] == [0.01] * 6 and set(other) == {0.05}
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
