#!/usr/bin/env bash
# Guess: a DataLoader without workers makes a batch when the loop asks for it, also behind accelerator.prepare(). So a
#   dataset that samples from the policy gives on-policy batches.
# What happens: the prepared loader is always one batch ahead, to know which batch is the last. Batch n + 1 is sampled
#   before the loop has trained on batch n. So from the second step on each batch is one update old, on one process
#   and with num_workers=0, for both kinds of datasets. No warning comes. Who leaves the loop early has sampled one
#   batch that is never used.
# Versions: accelerate 1.15.0, torch 2.13.0.
# Why it matters here: code that computes the old log-probabilities when a batch arrives sees a ratio of exactly 1, so
#   the check of the first ratio passes, and the answers are still another policy's. Sample in the loop, as rl.py does,
#   and prepare only model and optimizer; or keep the log-probabilities from the sampling.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PYTHON'
import accelerate, torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

accelerator = accelerate.Accelerator(cpu=True)

class Policy:
    updates, sampled = 0, 0

    def sample(self):
        """In the place of an answer: how many updates the policy that gives it has had."""
        self.sampled += 1
        return torch.tensor(self.updates)

class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield policy.sample()

class Table(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, i):
        return policy.sample()

print("accelerate", accelerate.__version__, "torch", torch.__version__)
seen = []
for kind in (Stream, Table):
    for prepared in (False, True):
        policy, ages = Policy(), []
        loader = DataLoader(kind(), batch_size=4, num_workers=0)
        for batch in accelerator.prepare(loader) if prepared else loader:
            ages.append(policy.updates - batch.max().item())
            policy.updates += 1  # optimizer.step()
            if len(ages) == 5:
                break
        seen.append((ages, policy.sampled))
        name = f"{kind.__name__}, {'prepared' if prepared else 'plain'}"
        print(f"{name:16} updates since each batch was sampled: {ages}; answers sampled: {policy.sampled}, used: 20")
still = seen == [([0] * 5, 20), ([0, 1, 1, 1, 1], 24)] * 2
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
