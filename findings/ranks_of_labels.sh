#!/usr/bin/env bash
# Guess: cohen_kappa_score(weights="quadratic") weighs a disagreement by the squared difference of the two scores, so a
#   judge that gives 1 where a person gives 9 agrees less than one that gives 10 where the person gives 9.
# What happens: the scores are replaced by their ranks among the labels that occur. Where nobody gave a score from 2 to
#   8, 1 and 9 are neighbours as 9 and 10 are, and the two judges below have nearly one kappa: .88 and .87, where the
#   scale from 1 to 10 gives .99 and .69. Seven more answers on which both agree change .88 to .99. Labels that are
#   words are ranked by the alphabet: high, low, medium, so to confuse low with high is a small fault. There is no
#   warning. weights="linear" does the same.
# Versions: scikit-learn 1.9.1; krippendorff 0.9.0, whose interval alpha uses the values, for comparison.
# Why it matters here: the quadratic kappa is the usual agreement of a judge model with people, and of essay scorers.
#   Language models use few levels of a scale, so the number hangs on which ones they happen to use, and differs between
#   two halves of one set. Give labels=range(1, 11), or the words in their order, each time.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile scikit-learn==1.9.1 krippendorff==0.9.0 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
from importlib.metadata import version
import krippendorff, sklearn
from sklearn.metrics import cohen_kappa_score

def kappa(person, judge, **options):
    return round(cohen_kappa_score(person, judge, weights="quadratic", **options), 2)

def scores(*confused, more=()):
    """A person's and a judge's scores: they agree on 1, 9 and 10, and mix up two scores in 20 answers."""
    agreed = [1] * 40 + [9] * 30 + [10] * 30 + list(more)
    low, high = confused
    return agreed + [low] * 10 + [high] * 10, agreed + [high] * 10 + [low] * 10

print("scikit-learn", sklearn.__version__, "krippendorff", version("krippendorff"))
seen = []
for name, pair in (("mixes up 9 and 10", scores(9, 10)), ("mixes up 1 and 9", scores(1, 9)),
                   ("mixes up 9 and 10, seven more agreed answers", scores(9, 10, more=range(2, 9)))):
    alpha = round(krippendorff.alpha(reliability_data=pair, level_of_measurement="interval"), 2)
    seen.append((kappa(*pair), kappa(*pair, labels=range(1, 11)), alpha))
    print(f"{name:45} kappa {seen[-1][0]}, labels=range(1, 11) {seen[-1][1]}, interval alpha {alpha}")
words, worded = ["low", "medium", "high"], []
for confused in (("medium", "high"), ("low", "high")):
    person, judge = words * 30 + list(confused) * 10, words * 30 + list(confused[::-1]) * 10
    worded.append((kappa(person, judge), kappa(person, judge, labels=words)))
    print(f"mixes up {confused[0]} and {confused[1]}".ljust(45), f"kappa {worded[-1][0]}, labels={words} {worded[-1][1]}")
still = seen == [(0.88, 0.99, 0.99), (0.87, 0.69, 0.69), (0.99, 0.99, 1.0)] and worded == [(0.5, 0.86), (0.86, 0.5)]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
