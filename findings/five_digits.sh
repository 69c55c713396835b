#!/usr/bin/env bash
# Guess: Inspect's scorer match(numeric=True) compares numbers: 123,456 is 123456 and 123456.0, and not 123457.
# What happens: both numbers are rounded to five significant digits before they are compared. So a wrong integer of six
#   or more digits is CORRECT where it rounds to the same five, and it can be off by up to one part in ten thousand:
#   123457 passes for 123456, and each answer from 999995 to 1000050 for 1000000. Below 100,000 integers are compared
#   exactly, so tests with small numbers pass. The rounding is not in the documentation and cannot be set. The log
#   shows both answers as 1.2346e+05.
# Versions: inspect_ai 0.3.285.
# Why it matters here: a product of two three-digit numbers, a large sum and a count are what arithmetic tasks ask for,
#   and the last digits are what a model gets wrong. The better it guesses the magnitude, the more is credited, so the
#   task looks learnt. As a reward, it pays for rounding. Compare fractions, as verifier.py does, or Python's integers
#   in a scorer of your own, and test a scorer with an answer that is off by one in the last digit.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile inspect_ai==0.3.285
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import inspect_ai
from inspect_ai.model import ModelOutput
from inspect_ai.scorer import CORRECT, Target, match
from inspect_ai.solver import TaskState

def judged(answer, target, **options):
    output = ModelOutput.from_content("mock", answer)
    state = TaskState(model="mock/model", sample_id=1, epoch=1, input="", messages=[], output=output)
    score = asyncio.run(match(**options)(state, Target(target)))
    return score.value == CORRECT, score.answer

print("inspect_ai", inspect_ai.__version__)
seen = []
for answer, target in (("351 * 352 is 123552.", "123552"), ("351 * 352 is 123,552", "123552"),
                       ("351 * 352 is 123553.", "123552"), ("351 * 352 is 123548.", "123552"),
                       ("351 * 352 is 124552.", "123552"), ("351 * 35 is 12286.", "12285")):
    right, read = judged(answer, target, numeric=True)
    seen.append(right)
    print(f"{answer:22} target {target:7} read as {read:11} {'CORRECT' if right else 'INCORRECT'}")
paid = [n for n in range(999900, 1000200) if judged(str(n), "1000000", numeric=True)[0]]
print(f"target 1000000: {len(paid)} integers are CORRECT, from {paid[0]} to {paid[-1]}")
still = seen == [True, True, True, True, False, False] and (paid[0], paid[-1]) == (999995, 1000050)
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
