#!/usr/bin/env bash
# Guess: scipy.stats.ttest_rel(new, old) of two columns of counts is positive where the new model has more right
#   answers, whatever integers they are. ttest_ind and wilcoxon take the same columns and give the same as for floats.
# What happens: ttest_rel subtracts before it turns anything into floats, and unsigned integers have no -1: 3 - 4 is
#   4294967295. One does not have to ask for them: polars counts in UInt32, also where it sums up booleans. So a model
#   that is worse on average is better with p = 1e-8, and the same the other way round: ttest_rel(old, new) says that
#   the old one is better. A right or wrong in uint8 goes the same way. There is no warning. Where no hand got worse
#   the result is right.
# Versions: scipy 1.17.1, polars 2.1.0, numpy 2.4.6.
# Why it matters here: right answers per hand or per route, summed up by group_by, are what a paired test of two
#   checkpoints takes. Here .025 for SFT becomes 1e-8 for PPO. Sum .cast(pl.Float64), or .mean() instead of .sum(), and
#   look whether the t has the sign of the difference of the means, or whether confidence_interval() has it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile scipy==1.17.1 polars==2.1.0 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import numpy, polars, scipy
from scipy.stats import ttest_ind, ttest_rel, wilcoxon

def table(models):
    """{model: its chance} -> polars' rows of 8 answers to each of 40 hands."""
    random = numpy.random.default_rng(0)
    return polars.DataFrame([(model, hand, bool(random.random() < chance)) for model, chance in models.items()
                             for hand in range(40) for _ in range(8)], ["model", "hand", "right"], orient="row")

def columns(answers, sum_of):
    sums = answers.group_by("model", "hand").agg(sum_of).sort("hand")
    return [sums.filter(model=model)["right"].to_numpy() for model in ("ppo", "sft")]

print("scipy", scipy.__version__, "polars", polars.__version__, "numpy", numpy.__version__)
answers = table({"sft": 0.6, "ppo": 0.5})
seen = {}
right = polars.col("right")
for name, sum_of in (("sum()", right.sum()), ("cast, sum()", right.cast(polars.Float64).sum())):
    ppo, sft = columns(answers, sum_of)
    both = ttest_rel(ppo, sft), ttest_rel(sft, ppo)
    seen[name] = [float(x) for test in both for x in test]
    others = [float(x) for test in (ttest_ind(ppo, sft), wilcoxon(ppo, sft)) for x in (test.statistic, test.pvalue)]
    seen[name, "others"] = others
    print(f"{name:11} {ppo.dtype}: PPO {ppo.mean():.2f} of 8, SFT {sft.mean():.2f}; ttest_rel(ppo, sft) t "
          f"{both[0].statistic:.2f}, p {both[0].pvalue:.1e}; ttest_rel(sft, ppo) t {both[1].statistic:.2f}, "
          f"p {both[1].pvalue:.1e}\n    ttest_ind t {others[0]:.2f}, p {others[1]:.3f}; wilcoxon p {others[3]:.3f}")

one = numpy.array([1, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0]), numpy.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1])
worse = {kind: float(ttest_rel(*(x.astype(kind) for x in one)).statistic) for kind in ("uint8", "int8", "float64")}
print("right or wrong, old model and a better one, t:", {kind: round(x, 2) for kind, x in worse.items()})
better = {kind: float(ttest_rel(*(x.astype(kind) for x in one[::-1])).statistic) for kind in ("uint8", "float64")}
print("the same, better model first, t:", {kind: round(x, 2) for kind, x in better.items()})
(t, p, back, _), (true, chance, true_back, _) = seen["sum()"], seen["cast, sum()"]
still = (true < -2 and true_back > 2 and chance > 0.01 and t > 2 and back > 2 and p < 1e-6
         and seen["sum()", "others"] == seen["cast, sum()", "others"]
         and worse["uint8"] > 2 and worse["int8"] == worse["float64"] < -2 and better["uint8"] == better["float64"] > 2)
raise SystemExit(0 if still else f"the behaviour has changed: {seen} {worse} {better}")
PYTHON
