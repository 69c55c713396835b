#!/usr/bin/env bash
# Guess: a p-value that is NaN, as the paired t-test gives where two models answer every question alike, stays NaN when
#   p-values are corrected for their number, and the others are corrected as without it.
# What happens: with fdr_bh, fdr_by, simes-hochberg and hommel EVERY corrected p-value is NaN. reject is something else:
#   with fdr_bh it calls three benchmarks significant of which p < 0.05 calls none, with hommel it calls none. And holm,
#   where the other three are significant, calls the equal benchmark significant, too: its test for "not below" is
#   false for a NaN. Bonferroni counts it as one more test. Neither the t-test nor the correction warns. scipy's
#   false_discovery_control raises.
# Versions: statsmodels 0.15.0, scipy 1.17.1.
# Why it matters here: two checkpoints with the same answers on one benchmark are common: all right, all wrong, or an
#   evaluation that failed. That one row turns "better on three of three" into "no significant difference", or
#   makes a difference of an equality. Correct the finite p-values only, say how many tests that is, and
#   report an equal benchmark as such.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile statsmodels==0.15.0 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import numpy, scipy, statsmodels
from scipy.stats import false_discovery_control, ttest_rel
from statsmodels.stats.multitest import multipletests

def answers(right):
    """1 for each right answer of 200, the right ones first."""
    return numpy.arange(200) < right

print("statsmodels", statsmodels.__version__, "scipy", scipy.__version__)
benchmarks = {"arithmetic": (120, 132), "routes": (90, 97), "cards": (180, 185), "letters": (200, 200)}
p = numpy.array([ttest_rel(answers(new) * 1.0, answers(old) * 1.0).pvalue for old, new in benchmarks.values()])
for (name, (old, new)), value in zip(benchmarks.items(), p):
    print(f"{name:11} {old} of 200 right, then {new}: p {value:.4f}")
seen = {}
for method in ("fdr_bh", "fdr_by", "simes-hochberg", "hommel", "holm", "bonferroni"):
    (reject, corrected), (wanted, finite) = (multipletests(x, method=method)[:2] for x in (p, p[:3]))
    seen[method] = [int(x) for x in (reject.sum(), (corrected < 0.05).sum(), wanted.sum(), numpy.isnan(corrected).sum())]
    print(f"{method:14} all four: {corrected.round(4)}, rejected {seen[method][0]}, below .05: {seen[method][1]}; "
          f"without letters: {finite.round(4)}, rejected {seen[method][2]}")
try:
    false_discovery_control(p)
    raised = False
except ValueError as error:
    raised = True
    print("scipy's false_discovery_control:", error)
still = raised and list(seen.values()) == [[3, 0, 3, 4], [2, 0, 3, 4], [3, 0, 3, 4], [0, 0, 3, 4], [4, 3, 3, 1],
                                           [2, 2, 2, 1]]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
