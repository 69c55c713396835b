#!/usr/bin/env bash
# Guess: math_verify.parse() reads 0.\overline{3} as a third, or finds no number in it.
# What happens: it takes what stands in front of the overlined digits. 0.\overline{3} is 0, and 1.\overline{6} is 1. So
#   a right answer to the reference 1/3 is wrong, and a wrong one to 0 or 1 is right, and any two repeating decimals
#   with the same integer part are equal: 0.\overline{3} and 0.\overline{7}. Dots over the digits and 0.(3) are cut in
#   the same way. If digits stand in front of the overlined ones, 0.1\overline{6}, it is a product with a symbol of the
#   name "bar{6}", and only its own text is equal to it. There is no error or warning.
# Versions: math-verify 0.9.0 with latex2sympy2_extended 1.11.0 and sympy 1.14.0.
# Why it matters here: as a reward it pays for a wrong digit and punishes a right answer in a usual form. A table of
#   accuracy shows neither. Ask for fractions, or replace such decimals by fractions before parse(). The verifier here
#   computes with exact fractions and takes no decimals.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0
"$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
from importlib.metadata import version
import math_verify

def parse(text):
    return math_verify.parse(f"${text}$", parsing_timeout=None)  # no time limits: a slow machine must not decide

print(*(f"{name} {version(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy")))
for text in (r"\frac{1}{3}", r"0.\overline{3}", r"1.\overline{6}", r"0.\dot{3}", "0.(3)", r"0.1\overline{6}"):
    print(f"{text:16} is read as {parse(text)[0]}")
seen = {}
for reference, answer in ((r"\frac{1}{3}", r"\frac{2}{6}"), (r"\frac{1}{3}", r"0.\overline{3}"),
                          ("0", r"0.\overline{3}"), ("1", r"1.\overline{6}"), (r"0.\overline{3}", r"0.\overline{7}"),
                          (r"\frac{1}{6}", r"0.1\overline{6}")):
    seen[reference, answer] = math_verify.verify(parse(reference), parse(answer), timeout_seconds=None)
    print(f"reference {reference:16} answer {answer:16} {'right' if seen[reference, answer] else 'wrong'}")
kept = list(seen.values()) == [True, False, True, True, True, False]
raise SystemExit(0 if kept else "the behaviour has changed")
PYTHON
