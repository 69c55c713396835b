#!/usr/bin/env bash
# Guess: torch.autocast() casts a weight whenever a layer uses it, so optimizer.step() inside the block is harmless.
# What happens: the block keeps the cast copy of each weight until its end. optimizer.step() changes the weight and not
#   the copy, so every forward pass in the block uses the first weights. Loss and gradients never change, and no warning
#   comes. The optimizer adds the same gradient again and again.
# Versions: torch 2.13.0, on the CPU.
# Why it matters here: with PPO's epochs inside one block the ratio is exactly 1 in all of them, so the check of the
#   first ratio passes, nothing is ever clipped, and the weights go too far. Enter autocast anew for each forward pass.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

def losses(blocks):
    """Losses of 4 steps of SGD on one batch. blocks: as many autocast blocks, each with its share of the steps."""
    torch.manual_seed(0)
    layer, x, y = torch.nn.Linear(4, 1), torch.randn(8, 4), torch.randn(8, 1)
    sgd, seen = torch.optim.SGD(layer.parameters(), lr=0.1), []
    for _ in range(blocks):
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(4 // blocks):
                loss = (layer(x).float() - y).square().mean()
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                seen.append(round(loss.item(), 4))
    return seen

print("torch", torch.__version__)
print("a block for each step: losses", losses(4))
print("one block for 4 steps: losses", losses(1))
still = len(set(losses(1))) == 1 and len(set(losses(4))) == 4
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
