#!/usr/bin/env bash
# Guess: MeanMetric().update(loss, weight=tokens) is the weighted mean, and nan_strategy="disable", "disable all nan
#   checks", leaves out a check and changes nothing where there is no NaN.
# What happens: with "disable" every weight is replaced by 1. update() and forward() take weights as ever, and what
#   comes out is the plain mean of the values. RunningMean does the same. With "error", "warn", "ignore" and a number
#   as nan_strategy the weights count. There is no warning, and values without weights are right.
# Versions: torchmetrics 1.9.0, torch 2.13.0.
# Why it matters here: a loss per token is the mean of the batches' losses, weighted by their tokens, and the check for
#   NaN, which waits for the GPU in each step, is what one switches off. The number stays plausible. Here batches of
#   long answers have the lower loss, and the perplexity is 4.3 in place of 2.8. Give loss * tokens and tokens to two
#   SumMetrics, which have no weights to lose, and divide.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
"$folder/venv/bin/python" -W error - <<'PYTHON'
import math
import torch, torchmetrics
from torchmetrics import MeanMetric, RunningMean, SumMetric

torch.manual_seed(0)
tokens = torch.cat([torch.randint(8, 30, (30,)), torch.randint(200, 900, (10,))])  # of 40 batches, short answers first
losses = 2.2 - 0.2 * tokens.log() + 0.1 * torch.randn(40)
true = ((losses * tokens).sum() / tokens.sum()).item()

def mean(metric, weighted=True, call="update"):
    for loss, count in zip(losses, tokens):
        getattr(metric, call)(loss, weight=count) if weighted else metric.update(loss)
    return metric.compute().item()

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
print(f"by hand: loss per token {true:.3f}, perplexity {math.exp(true):.1f}; mean of the batches {losses.mean():.3f}")
seen = {}
for strategy in ("error", "warn", "ignore", 0.0, "disable"):
    seen[strategy] = [mean(MeanMetric(nan_strategy=strategy)), mean(MeanMetric(nan_strategy=strategy), call="forward"),
                      mean(RunningMean(window=40, nan_strategy=strategy)),
                      mean(MeanMetric(nan_strategy=strategy), weighted=False)]
    print(f"nan_strategy={strategy!r:9} weighted: update {seen[strategy][0]:.3f}, forward {seen[strategy][1]:.3f}, "
          f"RunningMean {seen[strategy][2]:.3f} (perplexity {math.exp(seen[strategy][0]):.1f}); "
          f"without weights {seen[strategy][3]:.3f}")
both = [SumMetric(nan_strategy="disable") for _ in range(2)]
for loss, count in zip(losses, tokens):
    both[0].update(loss * count)
    both[1].update(count)
instead = (both[0].compute() / both[1].compute()).item()
print(f"two SumMetrics, nan_strategy='disable': {instead:.3f}")

def near(values, number):
    return all(abs(x - number) < 1e-4 for x in values)

plain = losses.mean().item()
still = (plain - true > 0.3 and near([instead], true) and near(seen["disable"], plain)
         and all(near(x[:3], true) and near(x[3:], plain) for name, x in seen.items() if name != "disable"))
raise SystemExit(0 if still else f"the behaviour has changed: {seen}")
PYTHON
