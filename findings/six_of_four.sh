#!/usr/bin/env bash
# Guess: math_verify.parse() reads 6(4), (6)(4) and 2(3)(4) as products, as it reads 6(3+1) and 2x. A whole number with
#   a fraction behind it, 2\frac{1}{2}, is a mixed number.
# What happens: every integer with a positive integer or fraction right behind it is a mixed number, whatever the
#   brackets: the two are added. 6(4) and (6)(4) are 10, 2(3)(4) is 9, \frac{1}{2}(6)(8) is 7, 10 - 2(3) is 5. Behind a
#   slash the sum is the divisor: 6/2(4) is 1. If a sum, a negative number, a decimal or a power follows, it is the
#   product: 6(3+1) is 24. There is no error or warning. The option interpret_as_mixed_fractions is never read.
# Versions: math-verify 0.9.0 with latex2sympy2_extended 1.11.0 and sympy 1.14.0.
# Why it matters here: (6)(4) is a common way to write 6 times 4. A formula in a box is right or wrong by how it writes
#   its products, and a model that is paid by this verifier is paid for (20)(4) where 24 is wanted. Ask for * or \cdot,
#   or put \cdot between ")(" and between a digit and "(" before parse(). verifier.py reads formulas with its own rules.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$folder/venv/bin/python" - 2> >(grep -vi "timeout" >&2) <<'PYTHON'
from importlib.metadata import version
import math_verify

def parse(text):
    return math_verify.parse(text, parsing_timeout=None)  # no time limits: a slow machine must not decide

def right(reference, answer):
    return math_verify.verify(parse(reference), parse(answer), timeout_seconds=None)

print(*(f"{name} {version(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy")))
read = {"2\\frac{1}{2}": 2.5, "6 \\cdot 4": 24, "6(3+1)": 24, "2(3)^2": 18, "16(1.5)": 24, "(-6)(-4)": 24,
        "6(4)": 10, "(6)(4)": 10, "2(3)(4)": 9, "\\frac{1}{2}(6)(8)": 7, "10 - 2(3)": 5, "6/2(4)": 1}
seen = {}
for text in read:
    seen[text] = float(parse(f"${text}$")[0])
    print(f"{text:18} is read as {seen[text]:g}")
verdicts = []
for reference, answer in (("24", "6 \\cdot 4"), ("24", "(6)(4)"), ("24", "(20)(4)"), ("24", "(8)(9-6)"),
                          ("10", "6(4)")):
    verdicts.append(right(f"${reference}$", f"The answer is \\boxed{{{answer}}}."))
    print(f"reference {reference} answer {answer:10} {'right' if verdicts[-1] else 'wrong'}")
still = seen == read and verdicts == [True, False, True, True, True]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
