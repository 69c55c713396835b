#!/usr/bin/env bash
# Guess: accelerate's save_state() in the middle of an epoch, and load_state() with skip_first_batches() in a new
#   process, go on with the rest of that epoch, as accelerate's guide to checkpoints shows it.
# What happens: with shuffle=True the order of an epoch is drawn when it begins. load_state() restores the generator as
#   it was at the save, so the new process draws ANOTHER order, and skips the first batches of that one. Of 40 rows, 10
#   came twice in the epoch and 10 never, with the same seed set at the start of both processes. Nothing warns.
#   DataLoaderConfiguration(use_seedable_sampler=True), off by default, keeps the order, if both set the same seed.
# Versions: accelerate 1.15.0, torch 2.13.0.
# Why it matters here: on a small set of demonstrations, an SFT run that was stopped has seen some of them twice as
#   often as others, and one that was not stopped is another run: the loss goes on smoothly in both. A batch that is
#   a function of (seed, step), as in sft.py and rl.py, has no order to lose.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 accelerate==1.15.0
cat > "$folder/epoch.py" <<'PYTHON'
import sys
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

seedable, state, what = sys.argv[1] == "True", sys.argv[2], sys.argv[3]
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
set_seed(7)
model = torch.nn.Linear(1, 1)
loader = torch.utils.data.DataLoader(list(range(40)), batch_size=4, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters()), loader)
if what == "rest":
    accelerator.load_state(state)
    loader = accelerator.skip_first_batches(loader, 5)
for number, batch in enumerate(loader, 1):
    print(*batch.tolist(), end=" ")
    if what == "first" and number == 5:
        accelerator.save_state(state)
        break
PYTHON
cat > "$folder/compare.py" <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version

def rows(*arguments):
    command = [sys.executable, "-W", "ignore", f"{sys.argv[1]}/epoch.py", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

print("accelerate", version("accelerate"), "torch", version("torch"))
seen = []
for seedable in ("True", "False"):
    state = f"{sys.argv[1]}/{seedable}"
    whole, first, rest = (rows(seedable, state, what) for what in ("whole", "first", "rest"))
    twice, never = len(set(first) & set(rest)), 40 - len({*first, *rest})
    print(f"use_seedable_sampler={seedable:5}  same first half: {first == whole[:20]}  same second half: "
          f"{rest == whole[20:]}  rows seen twice: {twice}, never: {never}")
    seen.append((first == whole[:20], rest == whole[20:], twice > 0, never > 0))
expected = [(True, True, False, False), (True, False, True, True)]
raise SystemExit(0 if seen == expected else f"the behaviour has changed: {seen}")
PYTHON
"$folder/venv/bin/python" "$folder/compare.py" "$folder"
