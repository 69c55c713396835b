#!/usr/bin/env bash
# Guess: a model whose output layer is its embedding (head.weight = emb.weight) stays so, however it is loaded.
#   At least the two are tied as long as they are one memory and always equal.
# What happens: load_state_dict(..., assign=True), which a model made on the meta device needs, makes a Parameter of
#   each entry. From a state_dict() or torch.save() both entries are one memory, so the two are equal before and behind
#   each step, and every test of that passes. But the optimizer has two parameters, each with a part of the gradient and
#   averages of its own, and moves the memory twice a step. AdamW also decays it twice. SGD hides all this: the parts
#   add up. From a file that keeps one copy, as safetensors' save_model() does, loading raises for want of a key.
# Versions: torch 2.13.0, on the CPU.
# Why it matters here: many small language models are tied. A resumed run learns the embedding at up to twice the rate,
#   and its gradient norm is another one, so clipping is. Tie once more behind such a load, as from_pretrained() does
#   here, and count the parameters: list(model.parameters()) is one longer.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/model.pt" <<'PYTHON'
import sys
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.emb(ids))

def load(assign):
    with torch.device("meta" if assign else "cpu"):
        model = Tied()
    model.load_state_dict(torch.load(sys.argv[1]), assign=assign)
    return model

def step(assign, optimizer, **options):
    """Norm of the gradients, and how far the embedding moves in one step."""
    model, ids = load(assign), torch.arange(8)
    nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    before = model.emb.weight.detach().clone()
    optimizer(model.parameters(), **options).step()
    assert torch.equal(model.emb.weight, model.head.weight)
    return round(norm, 3), round((model.emb.weight - before).abs().mean().item(), 4)

print("torch", torch.__version__)
torch.manual_seed(0)
torch.save(Tied().state_dict(), sys.argv[1])
seen = {}
for assign in (False, True):
    seen[assign] = step(assign, torch.optim.SGD, lr=0.01), step(assign, torch.optim.AdamW, lr=0.01)
    print(f"assign={assign!s:5} parameters: {len(list(load(assign).parameters()))}, norm {seen[assign][0][0]}, "
          f"one step moves the embedding by {seen[assign][0][1]} with SGD, by {seen[assign][1][1]} with AdamW")
(sgd, adam), (sgd2, adam2) = seen[False], seen[True]
still = sgd[1] == sgd2[1] and adam2[1] > 1.2 * adam[1] and sgd2[0] != sgd[0]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
