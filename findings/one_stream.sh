#!/usr/bin/env bash
# Guess: reset(num_players=1, seed=0) of a TextArena game seeds that game, as gymnasium's reset(seed=0) does: its draws
#   come from a generator of its own, and neither the program around it nor a second game hangs on it.
# What happens: reset() calls random.seed(0) for the whole process, and the game draws from Python's one stream. So each
#   evaluation on fixed seeds sets the training's random module back to one and the same place: whatever it draws next,
#   it has drawn behind the last evaluation. And a game's cards hang on what else draws: two games that are played
#   in turns get other cards than one after the other, though their seeds are the same. There is no warning. seed=None
#   leaves the stream as it is.
# Versions: TextArena 0.7.4.
# Why it matters here: random.sample() of questions with an evaluation each few steps is how a small RL loop looks. This
#   one meets 16 of 1000 questions in 40 steps, again and again, and the curve looks like training. And results per
#   seed do not compare between a serial and a parallel evaluation. Give the loop a random.Random(seed) of its own, keep
#   random.getstate() around reset() and play seeded games one after the other.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile TextArena==0.7.4
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import random
from importlib.metadata import version
import textarena

def reset(seed):
    game = textarena.make("Blackjack-v0-raw")
    game.reset(num_players=1, seed=seed)
    return game

def training(draw, seeds):
    """40 steps with 8 questions each and an evaluation before every 2nd one -> how many different questions."""
    met = set()
    for step in range(40):
        for seed in seeds if step % 2 == 0 else []:
            game = reset(seed)
            while not game.step("[Stand]")[0]:
                pass
        met.update(draw.sample(range(1000), 8))
    return len(met)

print("TextArena", version("textarena"))
random.seed(7)
runs = {"no evaluation": (random, []), "evaluation, seed=None": (random, [None] * 3),
        "evaluation, seeds 0, 1, 2": (random, [0, 1, 2]), "with own random.Random(7)": (random.Random(7), [0, 1, 2])}
met = {name: training(*run) for name, run in runs.items()}
for name, count in met.items():
    print(f"{name:25}: 320 draws of 1000 questions, {count} different ones")

def second_hands(in_turns):
    """The ranks that seeds 1 and 2 deal as second hands, to the player and to the dealer, after one stand each."""
    games = {}
    for seed in (1, 2, 1, 2) if in_turns else (1, 1, 2, 2):  # the first time reset, the second time a step
        games[seed].step("[Stand]") if seed in games else games.update({seed: reset(seed)})
    states = [game.state.game_state for game in games.values()]
    return [" ".join(card[:-1] for card in x["player_hand"] + x["dealer_hand"]) for x in states]

serial, turns, again = second_hands(False), second_hands(True), second_hands(False)
print(f"second hands of seeds 1 and 2: one after the other {serial}, again {again}; in turns {turns}")
dealt = serial == again and serial[0] != turns[0] and serial[1] != turns[1]
still = dealt and met.pop("evaluation, seeds 0, 1, 2") == 16 and min(met.values()) > 200
raise SystemExit(0 if still else f"the behaviour has changed: {met}")
PYTHON
