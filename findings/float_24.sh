#!/usr/bin/env bash
# Guess: sympify("12*2.0") == 24 is True, as 12*2.0 == 24 is in Python.
# What happens: it is False. Since sympy 1.13 a Float never equals an Integer or a Rational, whatever its value, while
#   the difference of the two does equal 0. So two ways to write one check disagree.
# Versions: sympy 1.14.0.
# Why it matters here: sympy is a common judge of formulas. One that compares with == calls "12*2.0" wrong, one that
#   subtracts calls it right. Subtract, or compute in fractions, as verifier.py does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sympy==1.14.0
"$folder/venv/bin/python" - <<'PYTHON'
import sympy
from sympy import sympify

print("sympy", sympy.__version__)
seen = []
for formula in ("8/(3-8/3)", "12*2.0"):
    value = sympify(formula)
    seen.append((value == 24, value - 24 == 0))
    print(f"{formula:10} value {value!s:18} value == 24: {seen[-1][0]!s:6} value - 24 == 0: {seen[-1][1]}")
raise SystemExit(0 if seen == [(True, True), (False, True)] else "the behaviour has changed")
PYTHON
