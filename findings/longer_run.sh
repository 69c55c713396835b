#!/usr/bin/env bash
# Guess: a run that ended at 100 steps goes on to 200 with a scheduler built for 200 steps: its constructor says how
#   long, load_state_dict() says where it stands.
# What happens: load_state_dict() brings the old length back. CosineAnnealingLR goes on to the old end and then UP: the
#   last step of the longer run has the full learning rate. So it is inside a SequentialLR behind a warm-up. LinearLR
#   stays at 0: the second half trains nothing. LambdaLR, which transformers' schedules are, has the new length, and
#   jumps. Only OneCycleLR raises. No warning comes, and right behind loading the rate is as expected.
# Versions: torch 2.13.0.
# Why it matters here: to double the budget of a run that was still learning is the usual reason to resume. The end of
#   the run, which a small rate should settle, is trained at the highest one. Set scheduler.T_max (total_iters) behind
#   load_state_dict(), look at the last rates before training, or compute the rate from the step and the
#   budget, as this repository does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

kinds = {
    "CosineAnnealingLR": CosineAnnealingLR,
    "SequentialLR": lambda sgd, steps: SequentialLR(
        sgd, [LinearLR(sgd, 0.1, 1, 10), CosineAnnealingLR(sgd, steps - 10)], [10]),
    "LinearLR": lambda sgd, steps: LinearLR(sgd, 1, 0, steps),
    "LambdaLR": lambda sgd, steps: LambdaLR(sgd, lambda step: 1 - step / steps),
    "OneCycleLR": lambda sgd, steps: OneCycleLR(sgd, 1, steps)}

def start(kind, steps):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    return sgd, kinds[kind](sgd, steps)

def train(sgd, scheduler, steps):
    """The learning rate behind each of some steps; behind an error its name."""
    rates = []
    for _ in range(steps):
        sgd.step()
        try:
            scheduler.step()
        except ValueError:
            return rates + ["ValueError"] * (steps - len(rates))
        rates.append(round(sgd.param_groups[0]["lr"], 2))
    return rates

print("torch", torch.__version__)
marks, seen = [81, 100, 125, 150, 175, 200], {}
print("rates behind steps", *marks, "of a run of 100 steps that was stopped at 80, resumed for 200, and of one of 200")
for kind in kinds:
    first, again, whole = start(kind, 100), start(kind, 200), start(kind, 200)
    rates = train(*first, 80)
    again[0].load_state_dict(first[0].state_dict())
    again[1].load_state_dict(first[1].state_dict())
    seen[kind], wanted = ([x[mark - 1] for mark in marks] for x in (rates + train(*again, 120), train(*whole, 200)))
    print(f"{kind:17} resumed {seen[kind]}, whole {wanted}")
ends = {kind: rates[-1] for kind, rates in seen.items()}
still = ends["CosineAnnealingLR"] == 1 and ends["SequentialLR"] > 0.9 and ends["OneCycleLR"] == "ValueError"
raise SystemExit(0 if still and seen["LinearLR"][1:] == [0] * 5 else "the behaviour has changed")
PYTHON
