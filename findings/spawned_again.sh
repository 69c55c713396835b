#!/usr/bin/env bash
# Guess: rng.bit_generator.state is the whole state of a NumPy Generator. A run that stores it and sets it again, in a
#   generator made from the same seed, goes on as the run without a break, also where it spawns.
# What happens: the state has the position in the stream. How many children were spawned stands in the seed sequence,
#   which is not in it. So behind a resume the generator itself draws on as it should, and rng.spawn() begins with the
#   first child again: the first questions, shuffles or noise once more. If the new generator has another seed, or
#   none, its own draws agree with the old run all the same, and its children are others at each start. And in one
#   process, setting an old state back does not bring back its children. Nothing warns. pickle keeps both.
# Versions: numpy 2.4.6.
# Why it matters here: the state is a plain dictionary, so it is what a checkpoint keeps as JSON. A test of the resume
#   that compares the generator's next draws passes, while a run with one child an epoch sees its first epochs twice.
#   Store rng.bit_generator.seed_seq.state, too, which counts the children, or pickle the generator; or make each
#   stream from its names and numbers, as this repository does: random.Random(f"rl/{seed}/{step}/{rank}").
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6
"$folder/venv/bin/python" -W error - <<'PYTHON'
import json, pickle
import numpy as np

def epoch(rng):
    """The four cards of an epoch, by a child of its own, and a draw of the generator itself."""
    child, = rng.spawn(1)
    return child.integers(1, 14, 4).tolist(), int(rng.integers(1000))

def resumed(rng, state):
    rng.bit_generator.state = json.loads(state)
    return rng

print("numpy", np.__version__)
rng = np.random.default_rng(7)
before = [epoch(rng) for _ in range(2)]
state, pickled = json.dumps(rng.bit_generator.state), pickle.dumps(rng)
sequence = json.dumps(rng.bit_generator.seed_seq.state)
after = [epoch(rng) for _ in range(2)]

def run(rng):
    return [epoch(rng) for _ in range(2)]

both = np.random.Generator(np.random.PCG64(np.random.SeedSequence(**json.loads(sequence))))
rows = {"pickle": run(pickle.loads(pickled)), "state and seed_seq": run(resumed(both, state)),
        "state, same seed": run(resumed(np.random.default_rng(7), state)),
        "state, no seed": run(resumed(np.random.default_rng(), state)),
        "state, same object": run(resumed(rng, state))}
print(f"{'epochs 1 and 2':20}", before)
print(f"{'epochs 3 and 4':20}", after)
cards, draws = {}, {}
for name, row in rows.items():
    hands = [hand for hand, _ in row]
    cards[name] = ("as epoch 3 and 4" if hands == [hand for hand, _ in after] else
                   "as epoch 1 and 2" if hands == [hand for hand, _ in before] else "others")
    draws[name] = [d for _, d in row] == [d for _, d in after]
    print(f"{name:20} cards {cards[name]}, draws as without a break: {draws[name]}")
still = list(cards.values()) == ["as epoch 3 and 4"] * 2 + ["as epoch 1 and 2", "others", "others"]
still = still and all(draws.values())
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
