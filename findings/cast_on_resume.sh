#!/usr/bin/env bash
# Guess: optimizer.load_state_dict(optimizer.state_dict()) gives back what was saved: each tensor in its type.
# What happens: every tensor of the state but the one named "step" is cast to the type of its parameter. With bfloat16
#   weights fp32 state becomes bfloat16, a count of 1,001 becomes 1,000.0, a mask of bools becomes numbers. torch's own
#   NAdam has such a tensor, the product of its momenta: three steps, a resume and six more steps do not give the
#   weights of nine steps. AdamW's do. The documentation of load_state_dict() does not tell of it.
# Versions: torch 2.13.0.
# Why it matters here: an optimizer that keeps an exact fp32 copy of bfloat16 weights, so that small steps count, loses
#   what it was made for at the first resume, and nothing says so. Train weights in fp32, as sft.py and rl.py do, or
#   override load_state_dict() and put the types back.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import torch

class Exact(torch.optim.Optimizer):
    """Gradient descent on fp32 copies of the weights. It counts its steps, and only some entries are free."""
    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(exact=p.float(), free=p > 0, count=torch.tensor(0), step=torch.tensor(0))
            state.update(count=state["count"] + 1, step=state["step"] + 1)
            state["exact"] -= 1e-4 * p.grad.float() * state["free"]
            p.copy_(state["exact"])

def begin(kind):
    p = torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    return p, kind([p], {}) if kind is Exact else kind([p], lr=0.1)

def go_on(p, optimizer, steps):
    for i in steps:
        p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(i)).bfloat16()
        optimizer.step()

def resume(kind, steps):  # -> weights and optimizer of a run, and of another that goes on from its state
    (p, optimizer), (q, resumed) = begin(kind), begin(kind)
    go_on(p, optimizer, range(steps))
    q.data.copy_(p.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return p, optimizer, q, resumed

print("torch", torch.__version__)
seen, (p, optimizer, q, resumed) = [], resume(Exact, 1001)
for name, x in optimizer.state[p].items():
    y = resumed.state[q][name]
    seen.append(y.dtype == x.dtype)
    print(f"{name:6} saved {x.dtype}, {x.max().item():.6g}   loaded {y.dtype}, {y.max().item():.6g}")
for kind in (torch.optim.AdamW, torch.optim.NAdam):
    p, optimizer, q, resumed = resume(kind, 3)
    go_on(p, optimizer, range(3, 9))
    go_on(q, resumed, range(3, 9))
    seen.append(torch.equal(p, q))
    print(f"{kind.__name__}: 3 steps, a resume and 6 steps are 9 steps: {seen[-1]}")
raise SystemExit(0 if seen == [False, False, False, True, True, False] else f"the behaviour has changed: {seen}")
PYTHON
