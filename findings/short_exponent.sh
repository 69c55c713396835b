#!/usr/bin/env bash
# Guess: math_verify.parse() reads "1e-05", which is what Python's str(0.00001) gives, as a hundred-thousandth, or finds
#   no number in it.
# What happens: it reads the number up to the e and leaves the exponent: 1e-05 is 1, 2.5e-3 is 2.5. Inside \boxed{} the
#   e is Euler's number: \boxed{1e-05} is e - 5. So verify() calls the right answer wrong and another one right, whether
#   the exponent is in the reference or in the answer. There is no error or warning.
# Versions: math-verify 0.9.0 with latex2sympy2_extended 1.11.0 and sympy 1.14.0.
# Why it matters here: math-verify is a common source of rewards. A reference that was a float once pays for the answer
#   1, and a model that prints a computed result is taught not to. Write references out, as format(x, "f") or 10^{-5},
#   and rewrite exponents in answers before they are judged. verifier.py computes in fractions.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$folder/venv/bin/python" - 2> >(grep -vi "timeout" >&2) <<'PYTHON'
from importlib.metadata import version
import math_verify

def parse(text):
    return math_verify.parse(text, parsing_timeout=None)  # no time limits: a slow machine must not decide

def verify(reference, answer):
    return math_verify.verify(parse(reference), parse(answer), timeout_seconds=None)

print(*(f"{name} {version(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy")))
for text in ("1e-05", "The answer is 2.5e-3.", "6.02E23", "\\boxed{1e-05}", "0.00001", "$10^{-5}$"):
    print(f"{text:24} is read as {float(parse(text)[0]):g}")
seen = []
for reference, answer in ((str(0.00001), "0.00001"), (str(0.00001), "1"), ("0.0025", "2.5e-3"), ("2.5", "2.5e-3"),
                          ("0.00001", "\\boxed{1e-05}"), ("0.00001", "$10^{-5}$")):
    seen.append(verify(reference, answer))
    print(f"reference {reference:8} answer {answer:14} {'right' if seen[-1] else 'wrong'}")
raise SystemExit(0 if seen == [False, True, False, True, False, True] else "the behaviour has changed")
PYTHON
