#!/usr/bin/env bash
# Guess: going through a DataLoader with shuffle=False and no workers needs no random numbers, so an evaluation on the
#   way does not change the training around it.
# What happens: each iter(loader) draws a number from torch's global generator, to seed workers that there are none of.
#   All that is sampled behind it is other: dropout, shuffling, generate(). So to evaluate, or to evaluate more often,
#   gives another run of the same seed. An empty loader draws, too.
# Versions: torch 2.13.0.
# Why it matters here: "the same seed, with and without evaluation" compares two runs, and --resume is exact only if it
#   evaluates as often as before. Give such a loader generator=torch.Generator(), or seed each step, as sft.py and
#   rl.py do.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.utils.data import DataLoader

def trained(evaluations, **options):
    """The weights after 3 steps on one batch with dropout, with so many evaluations before each step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    loader = DataLoader(x, batch_size=4, shuffle=False, num_workers=0, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model.eval()
        with torch.no_grad():
            for _ in range(evaluations):
                for rows in loader:
                    model(rows)
        model.train()
        sgd.zero_grad()
        (model(x) - y).square().mean().backward()
        sgd.step()
    return [round(w, 4) for w in model[1].weight[0].tolist()]

print("torch", torch.__version__)
seen = {(n, own): trained(n, **({"generator": torch.Generator()} if own else {}))
        for own in (False, True) for n in (0, 1, 2)}
for (n, own), weights in seen.items():
    print(f"{n} evaluations before a step, {'own' if own else 'no'} generator for the loader: weights {weights}")
different = len({str(seen[n, False]) for n in (0, 1, 2)})
same = len({str(seen[n, True]) for n in (0, 1, 2)})
raise SystemExit(0 if (different, same) == (3, 1) else "the behaviour has changed")
PYTHON
