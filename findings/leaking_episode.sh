#!/usr/bin/env bash
# Guess: time_limit_bootstrap=False, the default of skrl's PPO, treats an episode that the time limit cut off like one
#   that is over: no value behind its end. So no episode has a part in the advantages of another one.
# What happens: with False such an end is not seen at all. The value of the NEXT episode's first state is taken for the
#   state behind the cut, and the sum of GAE runs on through the next episode. What happens there changes the advantages
#   of the one before. An end by termination does cut the sum. With True a time limit cuts it, too, and the value
#   of the state behind the cut is added to the reward. A2C, RPO and TRPO do the same. There is no warning.
# Versions: skrl 2.1.1, torch 2.13.0.
# Why it matters here: a limit on the turns of a conversation ends many episodes, at first nearly all. A failed one
#   before a solved one is paid for it, which is noise of the size of the reward. Environments without a time limit, as
#   most tests have, do not show it. Set time_limit_bootstrap=True, or let the environment say "terminated", and check
#   that an edit in one episode leaves the others' advantages alone, as test_all.py does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 skrl==2.1.1
"$folder/venv/bin/python" - <<'PYTHON'
from importlib import import_module
from importlib.metadata import version
import torch
from skrl.agents.torch.ppo import PPO_CFG

def returns(agent, end, second, **options):
    """Value targets of two episodes of three steps. end: of the first one; second: last reward of the other."""
    rewards = torch.tensor([0., 0, 0, 0, 0, second])[:, None]
    ends = {name: torch.zeros(6, 1, dtype=torch.bool) for name in ("terminated", "truncated")}
    ends[end][2] = ends["terminated"][5] = True
    gae = import_module(f"skrl.agents.torch.{agent}.{agent}").compute_gae
    found, _ = gae(rewards=rewards, **ends, values=torch.zeros(6, 1), last_values=torch.zeros(1),
                   discount_factor=1.0, lambda_coefficient=0.95, **options)
    return [round(x, 2) for x in found[:, 0].tolist()]

print(*(f"{name} {version(name)}" for name in ("skrl", "torch")))
print("default of time_limit_bootstrap:", PPO_CFG().time_limit_bootstrap)
print("returns of an episode without a reward (three steps) and of the next one, which ends with the reward 5:")
seen = {}
for agent in ("ppo", "a2c", "rpo", "trpo"):
    for end, options in (("truncated", {}), ("terminated", {}), ("truncated", {"time_limit_bootstrap": True})):
        key = agent, end, bool(options)
        seen[key] = [returns(agent, end, second, **options)[:3] for second in (5., 0.)]
        print(f"{agent:4} first one {end:10} {'with True' if options else 'default':9}",
              returns(agent, end, 5., **options))
leaks = {key: both[0] != both[1] for key, both in seen.items()}
still = all(leak == (key[1:] == ("truncated", False)) for key, leak in leaks.items())
raise SystemExit(0 if still and not PPO_CFG().time_limit_bootstrap else "the behaviour has changed")
PYTHON
