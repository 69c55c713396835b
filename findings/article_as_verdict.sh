#!/usr/bin/env bash
# Guess: verifiers' ReferenceJudge asks a model whether an answer is right, "yes" or "no" only. Its documentation says
#   that a reply with neither label raises, as a judge's failure must not be scored. So a reply that begins with its
#   label and goes on counts as that label, or raises.
# What happens: the LAST word of the reply that is one of the labels counts, in capitals or not. "Yes. There is no
#   difference." is a no. With choices ("A", "B"), the example of the documentation, the article "a" is the label A, so
#   "B. It is a wrong number." pays 1, and any B with a reason behind it may. Only behind "verdict", "answer" or
#   "judgment" at the beginning of a line, or in a box, the first label counts. There is no warning.
# Versions: verifiers 0.4.0.
# Why it matters here: a judge may give a reason although it is asked for the label only, and each such reply may turn
#   a 0 into a 1. parse_judge_choice(), which is there for own judges, too, does the same, by default with A, B and C.
#   Take labels that occur in no sentence, as GRADE_1 and GRADE_0, let the judge end with "FINAL VERDICT: ...", and
#   look at the replies that are longer than a label.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile verifiers==0.4.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
import verifiers.v1 as vf
from verifiers.v1.judge import JudgeResponse
from verifiers.v1.judges import ReferenceJudge, ReferenceJudgeConfig

def paid(reply, choices):
    """The reward for an answer of which the judge says this, or None if the judge's failure raises."""
    judge = ReferenceJudge(ReferenceJudgeConfig(choices=choices))
    try:
        return judge.parse(JudgeResponse(text=reply))
    except ValueError:
        return None

words, letters, rare = ("yes", "no"), ("A", "B"), ("GRADE_1", "GRADE_0")
cases = [
    (words, "yes", 1.0), (words, "No.", 0.0), (words, "It is correct.", None),
    (words, "Yes. The response has the same four numbers.", 1.0), (words, "Verdict: yes, there is no difference.", 1.0),
    (words, "Yes. There is no difference.", 0.0), (words, "**Yes** - no card is used twice.", 0.0),
    (letters, "A", 1.0), (letters, "B", 0.0), (letters, "B: the two numbers differ.", 0.0),
    (letters, "Verdict: B. It is a wrong number.", 0.0),
    (letters, "B. It is a wrong number.", 1.0), (letters, "B\n\nThe formula uses a card twice.", 1.0),
    (letters, "The response is wrong, so B: a seven is missing.", 1.0),
    (rare, "GRADE_0. It is a wrong number.", 0.0), (rare, "GRADE_1. There is no difference.", 1.0)]
print("verifiers", version("verifiers"))
changed = []
for choices, reply, expected in cases:
    reward = paid(reply, choices)
    shown = "nothing, it raises" if reward is None else reward
    print(f"labels {'/'.join(choices):15} judge: {reply!r:52} pays {shown}")
    if reward != expected:
        changed.append(reply)
default = vf.parse_judge_choice("C. Not attempted: it is only a question.")
print("parse_judge_choice('C. Not attempted: it is only a question.'):", default)
raise SystemExit(0 if not changed and default == "A" else f"the behaviour has changed: {changed}")
PYTHON
