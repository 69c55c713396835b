#!/usr/bin/env bash
# Guess: Inspect's scorer exact() is right where the answer is the target, perhaps apart from case, blanks, a full stop.
# What happens: before they are compared, both texts are cut at blanks and hyphens, and lose their punctuation and the
#   words a, an and the. So a minus sign, a fraction's slash, brackets and comparison signs do not count: -24 is right
#   for 24, 1/2 for 12, (8-4)*6 for 8-4*6, and x < 5 for x > 5. A number with a decimal point is spared, if no
#   minus stands before it. The scorer f1() reads the same way. The documentation says only "normalizes".
# Versions: inspect-ai 0.3.285.
# Why it matters here: exact() looks like the strictest scorer there is, and a formula or a number is all an answer
#   consists of. "Exactly right" then has answers with a wrong sign in it, and a model that is paid by it need not
#   learn signs or brackets. Compare such answers with a scorer of your own, and as what they are: numbers
#   as numbers, formulas by a parser. verifier.py does both.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile inspect-ai==0.3.285
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import asyncio
from importlib.metadata import version
from inspect_ai.model import ModelName, ModelOutput
from inspect_ai.scorer import Target, exact, f1
from inspect_ai.solver import TaskState

PAIRS = [("24", "24"), ("25", "24"), ("2.4", "24"),                                    # judged as one would think
         ("-24", "24"), ("1/2", "12"), ("(8-4)*6", "8-4*6"), ("x < 5", "x > 5"), ("-2.5", "2.5"), ("4 - 3", "4 + 3")]

async def judged(scorer, answer, target):
    state = TaskState(model=ModelName("mockllm/model"), sample_id=1, epoch=1, input="?", messages=[],
                      output=ModelOutput.from_content("mockllm/model", answer))
    return (await scorer(state, Target(target))).value

async def main():
    print("inspect-ai", version("inspect-ai"))
    verdicts = []
    for answer, target in PAIRS:
        strict, soft = await judged(exact(), answer, target), await judged(f1(), answer, target)
        verdicts.append(strict)
        print(f"target {target:8} answer {answer:8} exact: {strict}   f1: {soft}")
    return "".join(verdicts)

seen = asyncio.run(main())
raise SystemExit(0 if seen == "CII" + "C" * 6 else f"the behaviour has changed: {seen}")
PYTHON
