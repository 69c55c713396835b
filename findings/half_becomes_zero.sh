#!/usr/bin/env bash
# Guess: tianshou's ReplayBuffer stores what a step reports. If a type does not fit, it raises or widens.
# What happens: the first step that is added fixes the type of each field: of the observation, of the action, and of
#   every number in info. If that first number is an int (a score of 0 or 1), later ones are cut to an int without a
#   word: .5 is stored as 0, and .99 too. If the first one is a float, all are right. So one and the same list
#   of scores has another mean in another order. Only the reward is always a float. A Collector fills it the same way.
# Versions: tianshou 2.0.1, numpy 2.4.6, torch 2.13.0.
# Why it matters here: a verifier's partial score (.5 for the right numbers and a wrong result) goes into info, and the
#   first episode of a run is nearly always wrong: an int 0. From then on only whole points are logged, or
#   learnt from. Write 0.0, or float(score), in every environment that reports a score.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 tianshou==2.0.1 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
from tianshou.data import Batch, ReplayBuffer

def stored(scores):
    """Add a step for each score, which is its observation, its reward and an entry of info -> what the buffer has."""
    buffer = ReplayBuffer(size=len(scores))
    for score in scores:
        buffer.add(Batch(obs=score, act=0, rew=score, obs_next=score, terminated=True, truncated=False,
                         info={"score": score}))
    found = {"info": buffer.info.score, "obs": buffer.obs, "rew": buffer.rew}
    print(f"added {scores}: ", "; ".join(f"{name} {x.tolist()}, {x.dtype}" for name, x in found.items()))
    return [x.tolist() for x in found.values()]

print(*(f"{name} {version(name)}" for name in ("tianshou", "numpy", "torch")))
late, early = [0, 0.5, 0.99, 1], [0.5, 0, 0.99, 1]
cut, kept = stored(late), stored(early)
still = cut == [[0, 0, 0, 1], [0, 0, 0, 1], late] and kept == [early] * 3
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
