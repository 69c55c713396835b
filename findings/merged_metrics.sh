#!/usr/bin/env bash
# Guess: a MetricCollection with the perplexity of all tokens and the perplexity without padding gives two numbers, as
#   the two metrics give on their own. What is shared between metrics hangs on their definitions.
# What happens: it hangs on the first batch. Metrics whose states are equal after the first update() count as one group,
#   and from then on only the first of them is updated, and the others are computed from its state. So if the first
#   batch has no padding, both names give the same number for ever. Accuracy at thresholds .5 and .9 becomes one if the
#   first batch is clear-cut, and word error rate becomes match error rate if its answers are all right. The same
#   batches in another order give both numbers. There is no warning. forward() does not group, only update() does.
# Versions: torchmetrics 1.9.0, torch 2.13.0.
# Why it matters here: batches sorted by length, or an easy first batch, are common in an evaluation. The number without
#   padding then counts the padding, and looks better than it is (here 2.1 instead of 5.1). Pass compute_groups=False,
#   or print collection.compute_groups behind the first update().
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
"$folder/venv/bin/python" -W error - <<'PYTHON'
import torch, torchmetrics
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.text import MatchErrorRate, Perplexity, WordErrorRate

torch.manual_seed(0)

def batch(pads):
    """Logits and ids of 4 rows of 10 tokens, the last ones of which are padding, id 0, which is easy to predict."""
    ids = torch.randint(1, 50, (4, 10))
    ids[:, 10 - pads:] = 0
    right = torch.nn.functional.one_hot(ids, 50)
    return torch.randn(4, 10, 50) + right * torch.where(ids == 0, 20., 3.)[..., None], ids

sure = torch.tensor([.95, .97, .02, .05]), torch.tensor([1, 1, 0, 0])
unsure = torch.tensor([.6, .7, .8, .3]), torch.tensor([0, 0, 0, 0])
cases = {
    "perplexity": (lambda: {"all": Perplexity(), "without padding": Perplexity(ignore_index=0)},
                   [batch(0)] + [batch(6) for _ in range(9)]),
    "accuracy": (lambda: {"above 50%": BinaryAccuracy(threshold=.5), "above 90%": BinaryAccuracy(threshold=.9)},
                 [sure, unsure]),
    "error rate": (lambda: {"match": MatchErrorRate(), "word": WordErrorRate()},
                   [(["turn left"], ["turn left"]), (["go to the end"], ["go on"])])}

def computed(metrics, batches, **options):
    collection = MetricCollection(metrics(), **options)
    for one in batches:
        collection.update(*one)
    return {name: round(x.item(), 3) for name, x in collection.compute().items()}

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
still = True
for name, (metrics, batches) in cases.items():
    seen = [computed(metrics, batches), computed(metrics, batches[::-1]),
            computed(metrics, batches, compute_groups=False)]
    print(f"{name:10} as they come {seen[0]}\n{'':10} in the other order {seen[1]}\n{'':10} without groups {seen[2]}")
    still &= len(set(seen[0].values())) == 1 and len(set(seen[2].values())) == 2 and seen[1] == seen[2]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
