#!/usr/bin/env bash
# Guess: a metric of torchmetrics that takes logits or probabilities counts each row alone, so accuracy and AUROC of a
#   set do not hang on how the set is cut into batches.
# What happens: whether numbers are logits is decided for each batch, by the largest and the smallest one. If all are
#   between 0 and 1, they count as probabilities, and a logit of 0.4, a yes, is a no. Else sigmoid is taken of all of
#   them. So a row's answer hangs on the other rows of its batch, and AUROC ranks the logits of some batches among the
#   probabilities of others. The order of the rows counts, too: rows sorted by label come in batches of one sign. There
#   is no warning. Batches of many rows have logits of both signs, so a test with one large batch is right.
# Versions: torchmetrics 1.9.0, torch 2.13.0.
# Why it matters here: a new head, of a reward model or a classifier of answers, gives logits near 0, and the last or
#   only batch of an evaluation is often small. Its accuracy then rises with the batch size, and during training as
#   the logits leave [0, 1], while nothing else has changed. Give such a metric logits.sigmoid(), or logits > 0.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
"$folder/venv/bin/python" -W error - <<'PYTHON'
import torch, torchmetrics
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

torch.manual_seed(0)
labels = torch.randint(2, (512,))
logits = 0.6 * (labels - 0.5) + 0.3 * torch.randn(512)

def computed(metric, numbers, labels, size):
    for start in range(0, len(labels), size):
        metric.update(numbers[start:start + size], labels[start:start + size])
    return round(metric.compute().item(), 3)

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
print("logits > 0 is right in", round(((logits > 0) == (labels == 1)).float().mean().item(), 3), "of 512 rows")
seen = {}
for name, order in (("as drawn", torch.arange(512)), ("sorted by label", labels.argsort(stable=True))):
    for size in (1, 2, 8, 512):
        row = [computed(metric(), numbers[order], labels[order], size) for metric in (BinaryAccuracy, BinaryAUROC)
               for numbers in (logits, logits.sigmoid())]
        seen[name, size] = row
        print(f"{name:15} batch size {size:3}: accuracy {row[0]:.3f}, AUROC {row[2]:.3f} of logits; "
              f"{row[1]:.3f} and {row[3]:.3f} of probabilities")
fixed = {(row[1], row[3]) for row in seen.values()}
whole = seen["as drawn", 512]
still = len(fixed) == 1 and whole[0] == whole[1] and whole[2] == whole[3] and seen["as drawn", 1][0] < 0.7
raise SystemExit(0 if still and seen["as drawn", 1][2] < 0.6 else "the behaviour has changed")
PYTHON
