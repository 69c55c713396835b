#!/usr/bin/env bash
# Guess: a verifier that compares answers as strings errs in one direction only: it may call a right answer wrong, and
#   what it calls right is right.
# What happens: verl's rule for DAPO first takes words such as the article "a" and the commas out of both strings. The
#   article is any "a" in front of a space. So 2a + b is read as 2+b: it is right where 2 + b is wanted, and wrong where
#   2a+b is. Two numbers, "3, 6", are read as 36, and are right where 36 is wanted. The answer in a box, without
#   "Answer:", is compared as it is, so "3, 6" is then wrong.
# Versions: verl 0.9.1, whose dispatcher calls this rule for the data sources math, math_dapo and aime*.
# Why it matters here: RL finds what a verifier pays for, and here it pays for other formulas and for lists. Whether an
#   answer is right hangs on its spaces. Compare values, as verifier.py does, and if it has to be strings, test the rule
#   with pairs that are different, too.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps --no-compile verl==0.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata, importlib.util

verl = importlib.metadata.distribution("verl")
path = verl.locate_file("verl/utils/reward_score/math_dapo.py")  # by its path: verl itself would import torch
spec = importlib.util.spec_from_file_location("math_dapo", path)
math_dapo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(math_dapo)

print("verl", verl.version)
seen = []
for reference, answer in (("2 + b", "Answer: 2a + b"), ("2a+b", "Answer: 2a + b"), ("2a+b", "Answer: 2a+b"),
                          ("36", "Answer: 3, 6"), ("36", "The answers are \\boxed{3, 6}."), ("36", "Answer: 35")):
    result = math_dapo.compute_score(answer, reference)
    seen.append(result["acc"])
    print(f"reference {reference:6} {answer:30} is read as {result['pred']:6} reward {result['score']:+g}")
raise SystemExit(0 if seen == [True, False, True, True, False, False] else "the behaviour has changed")
PYTHON
