#!/usr/bin/env bash
# Guess: clip_grad_norm_() takes its parameters as a set. One that is listed twice, as actor and critic share it, counts
#   once and is scaled once; or there is a warning, as the optimizers give one for such a list.
# What happens: its gradient counts twice in the norm and is scaled TWICE, by the square of the factor. Where the heads
#   keep a 50th of their gradients, the shared part keeps a 2500th. The returned norm is too large, and the norm behind
#   clipping is below the limit. foreach=False does the same, and nothing is said.
# Versions: torch 2.13.0. The documentation of clip_grad_norm_() does not mention it.
# Why it matters here: PPO with one body for policy and value is easily clipped as [*actor.parameters(),
#   *critic.parameters()] or by itertools.chain(). In steps that are clipped, which in PPO may be all, the body hardly
#   learns and the heads do. Tied embeddings listed by hand are the same case. Clip model.parameters(), as this
#   repository does, or list(dict.fromkeys(parameters)), and look at the norm behind clipping once.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import itertools, warnings
import torch
from torch import nn

torch.manual_seed(0)
body, policy, value = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 1)
actor, critic = nn.Sequential(body, nn.Tanh(), policy), nn.Sequential(body, nn.Tanh(), value)
both = nn.ModuleList([actor, critic])
x = torch.randn(256, 8)

def backward():
    """The same gradients each time -> their norms, of the body and of the heads, and of all."""
    both.zero_grad()
    (actor(x).square().sum(1).mean() + 9 * (critic(x) - 1).square().mean()).backward()
    return norms()

def norms():
    parts = [torch.cat([p.grad.flatten() for m in part for p in m.parameters()]).norm().item()
             for part in ([body], [policy, value])]
    return [*parts, sum(n * n for n in parts) ** 0.5]

def clipped(name, parameters, **options):
    before = backward()
    returned = nn.utils.clip_grad_norm_(parameters, 1.0, **options).item()
    after = norms()
    kept = [a / b for a, b in zip(after, before)]
    print(f"{name:23} norm {before[2]:.2f}, returned {returned:.2f}; left of the gradients: body {kept[0]:.4f}, heads "
          f"{kept[1]:.4f}, square of that {kept[1] ** 2:.4f}; norm behind {after[2]:.3f}")
    return abs(kept[0] / kept[1] - 1) < 1e-4, abs(kept[0] / kept[1] ** 2 - 1) < 1e-4, returned > 1.01 * before[2]

def chain():
    return itertools.chain(actor.parameters(), critic.parameters())

print("torch", torch.__version__)
once = [clipped("the whole model", both.parameters()), clipped("distinct ones", list(dict.fromkeys(chain())))]
twice = [clipped("actor and critic", chain()), clipped("the same, foreach=False", chain(), foreach=False)]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    torch.optim.Adam(chain())
    clipped("warnings are on", chain())
print("warnings, by the optimizer and by clipping:", [str(w.message)[:60] for w in said])
still = once == [(True, False, False)] * 2 and twice == [(False, True, True)] * 2 and len(said) == 1
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
