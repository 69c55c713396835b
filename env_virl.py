"""env_virl.py: V-IRL. Follow a route through a city by its instructions (paper, section 4.2).

    python env_virl.py            # shows a route, a prompt, the expert's answer and a failed attempt
    python env_virl.py FOLDER     # the same on the released data set in FOLDER

The interface is the same as in env_gp.py. An episode is a route, a sequence of positions. Each position is a
conversation of its own:
    right answer        the walk goes to the next position
    wrong answer        the conversation goes on with feedback, for up to `verify` attempts
    last attempt wrong  the episode ends; with move_on=True (evaluation) the walk goes on along the right path
Rules (Rule Variation): "id" turns by absolute words (north, ...), "ood" by relative words (left, ...).
The prompt names the action space, and its instructions hold both words: "Turn left to face west." So all that
the rule decides is which of the two words to copy.
With vl=True the current observation is not told in words but shown in four street views. Looks (Visual
Variation): visual="id" is one group of cities with one look, visual="ood" another group with another look.

Departures from the authors' release, in addition to those in README.md
  - After a turn the observation is only "at an intersection"; the landmark is not repeated.
  - A prompt in the city shows only the last HISTORY steps, which always include the last turn.
  - In the city at most one step lies between two intersections, so turns are 36% of all positions. There a
    picture answers only one question: after a forward(), has the walker arrived? A player who never looks
    solves 85% of the positions at the first attempt and all at the second. So with pictures, read success by
    the first attempt: "first" in eval.json.
  - In released routes, the five steps of a leg leave out those within 8 m of its end.
"""
import hashlib
import json
import math
import os
import pickle
import random
import re
import sys
from contextlib import contextmanager
from functools import lru_cache
from string import Template
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from verifier import (COMPASS, RELATIVE, VIRL_FEEDBACK, VIRL_REWARD, Step, compass_word, judge_virl,
                      last_json_object, relative_word, says_intersection)

RULES = {"id": COMPASS, "ood": RELATIVE}  # the words x of turn_direction(x)
OTHER = {"id": "ood", "ood": "id"}        # the other rule, and the other look
HISTORY = 3                    # steps that a prompt in the city shows
LEGS = (2, 2, 2, 3, 3, 4, 5)   # numbers of legs of a route in the city, drawn from these
TRAIN_ROUTES = 64              # SFT sees each route about 15 times, each of GeneralPoints' hands 48 times
CITIES = {"id": {"train": ("Aldham", "Brookport"), "unseen": ("Corvale", "Dunmore")},  # for each look
          "ood": {"train": ("Quorra", "Rivanje"), "unseen": ("Suvalk", "Torrid")}}
BASE_CITIES = 2000             # cities in pretraining; with only three the base would memorize their maps
LANDMARKS = [f"{first} {kind}" for kind in ("Bank", "Cafe", "Hotel", "Park", "Shop", "Inn")
             for first in ("Oak", "Star", "Moon", "Iron", "Gold", "Rose", "Lake", "Bell", "Sun", "Fox")]
LANDMARK = Template("$name is on your $side")  # how a place on the route tells of one


class Place(NamedTuple):  # where instructions change: the start, an intersection or the destination
    point: tuple           # (x, y) in blocks, or (lat, lng) in degrees
    landmark: str | None   # "Oak Cafe is on your left", for someone who arrives
    heading: float | None  # of the street that leads on, in degrees; None at the destination


class Route(NamedTuple):
    name: str              # unique
    facing: float | None   # heading at the start, in degrees; None: it is drawn from the seed
    places: tuple          # of Place
    between: tuple         # for each leg, the points on its way at which there may be a step
    chance: float          # the probability of each of these steps


class Position(NamedTuple):  # one decision
    observation: str
    instruction: str       # the current one
    turn: tuple | None     # (old heading, new heading) if the right action is a turn
    action: str | None     # else the right action
    point: tuple
    heading: float         # before the action


# ------------------------------------------------------------------------------------------------------------
# The city.

@lru_cache(maxsize=None)
def city(name):
    """A rotated and jittered 5 x 5 grid with a third of the diagonals -> (points: [(x, y)], streets: [set of
    neighbours], landmarks: [(name, heading towards it)]). The lists have an entry for each intersection.
    Training and unseen cities have disjoint halves of LANDMARKS; the cities of pretraining have all."""
    rng, grid = random.Random(f"city/{name}"), [(i, j) for i in range(5) for j in range(5)]
    tilt = rng.uniform(0, 2 * math.pi)
    points, streets = [], [set() for _ in grid]
    for i, j in grid:
        x, y = i + rng.uniform(-0.3, 0.3), j + rng.uniform(-0.3, 0.3)
        points.append((x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt)))
    for i, j in grid:
        ends = [((i, j), (i + 1, j)), ((i, j), (i, j + 1))]
        ends += [rng.choice([((i, j), (i + 1, j + 1)), ((i + 1, j), (i, j + 1))])] * (rng.random() < 0.7)
        for a, b in ends:
            if a in grid and b in grid:
                streets[grid.index(a)].add(grid.index(b))
                streets[grid.index(b)].add(grid.index(a))
    train, unseen = (CITIES["id"][split] + CITIES["ood"][split] for split in ("train", "unseen"))
    names = LANDMARKS[0::2] if name in train else LANDMARKS[1::2] if name in unseen else LANDMARKS
    landmarks = [(landmark, 90 - rng.uniform(0, 360)) for landmark in rng.sample(names, len(points))]
    return points, streets, landmarks


def on_the_way(a, b, share):
    return tuple(x + share * (y - x) for x, y in zip(a, b))


def city_route(name, rng):
    """A Route of 2-5 legs that turns by 15 to 150 degrees at every intersection and visits none twice. First
    the kind of turn (left, ...) is drawn and then a street, so the four kinds are about equally frequent."""
    points, streets, landmarks = city(name)
    while True:
        facing, legs = rng.randrange(360), rng.choice(LEGS)
        nodes, heading, headings = [rng.randrange(len(points))], facing, []
        while len(headings) < legs:
            here, kinds = nodes[-1], {}
            for there in sorted(streets[here] - set(nodes)):
                east, north = (b - a for a, b in zip(points[here], points[there]))
                ahead = math.degrees(math.atan2(east, north)) % 360
                if not headings or 15 <= abs((ahead - heading + 180) % 360 - 180) <= 150:
                    kinds.setdefault(relative_word(heading, ahead), []).append((there, ahead))
            if not kinds:
                break
            there, heading = rng.choice(kinds[rng.choice(sorted(kinds))])
            nodes.append(there)
            headings.append(heading)
        if len(headings) == legs:  # else the way ended too early
            break
    places, between = [Place(points[nodes[0]], None, headings[0])], []
    for node, arriving, leaving in zip(nodes[1:], headings, headings[1:] + [None]):
        landmark, towards = landmarks[node]
        side = "left" if (towards - arriving) % 360 > 180 else "right"
        between.append((on_the_way(places[-1].point, points[node], 0.5),))
        places.append(Place(points[node], LANDMARK.substitute(name=landmark, side=side), leaving))
    return Route(f"{name} {'-'.join(map(str, nodes))}", facing, tuple(places), tuple(between), 0.4)


@lru_cache(maxsize=None)
def training_routes(towns):
    """The TRAIN_ROUTES routes of fine-tuning through `towns`, a tuple of names. Every seed has the same."""
    rng, routes = random.Random(f"routes/{towns}"), {}
    while len(routes) < TRAIN_ROUTES:
        route = city_route(rng.choice(towns), rng)
        routes.setdefault(route.name, route)
    return list(routes.values())


# ------------------------------------------------------------------------------------------------------------
# The words. Fixed wording between $slots is one token of the tiny model's tokenizer.

FIRST = Template("First, turn $relative to face $absolute.")
TURN = Template("Turn $relative to face $absolute.")
MOVE = Template("Move forward until you reach next intersection where $landmark.")
MOVE_ON = "Move forward until you reach next intersection."  # no landmark there
ARRIVE = Template("Move forward until you reach destination where $landmark.")
NOTHING, CROSSING = "nothing nearby", "at an intersection"
IN_PICTURE = "see the picture: front, right / back, left."  # in place of the observation, with vl=True
ACTIONS = "Actions: forward(), stop() or turn_direction(x), x one of $words.\nRoute:\n$instructions\n"
LAST_STEPS = ACTIONS + "Last steps: $history\nNow: $observation\n"
PROMPT = Template("You walk along a route. What do you do?\n" + LAST_STEPS + 'Answer in JSON only: '
                  '{"current observation": "...", "current instruction": "...", "action": "..."}')
THAT_IS, ON_TO = ", that is ", "on to the "    # the expert's shorthand
WALK = Template("A walk. " + ACTIONS + "$steps")  # these two: in pretraining only
GLIMPSE = Template("On a walk. " + LAST_STEPS + "$answer")

SPACES = {**RULES, "letters": ("N", "NE", "E", "SE", "S", "SW", "W", "NW"),  # these two: in pretraining only
          "clock": tuple(f"{hour} o'clock" for hour in range(1, 13))}
TURN_WORD = {"id": lambda old, new: compass_word(new), "ood": relative_word,  # from two headings in degrees
             "letters": lambda old, new: SPACES["letters"][COMPASS.index(compass_word(new))],
             "clock": lambda old, new: SPACES["clock"][(round((new - old) / 30) - 1) % 12]}


def action_text(position, space):
    return position.action or f"turn_direction({TURN_WORD[space](*position.turn)})"


def walk(route, rng, relative="ood", absolute="id"):
    """Lay a route out -> (instructions: [str], positions: [Position]). rng draws the steps between places
    and, if the route has none, the first heading. relative, absolute: keys of SPACES for the two words.

        at the start or an intersection: turn, forward;  between: forward;  at the destination: stop"""
    heading = rng.randrange(360) if route.facing is None else route.facing
    instructions, positions = [], []
    for place, ahead, steps in zip(route.places, route.places[1:], route.between):
        turn, crossing = (heading, place.heading), bool(positions)  # crossing: not the start
        instructions.append((TURN if crossing else FIRST).substitute(relative=TURN_WORD[relative](*turn),
                                                                     absolute=TURN_WORD[absolute](*turn)))
        observation = (place.landmark or NOTHING) + f", {CROSSING}" * crossing
        positions.append(Position(observation, instructions[-1], turn, None, place.point, heading))
        heading, arrive = place.heading, ARRIVE if ahead.heading is None else MOVE
        instructions.append(arrive.substitute(landmark=ahead.landmark) if ahead.landmark else MOVE_ON)
        for point in [place.point] + [p for p in steps if rng.random() < route.chance]:
            observation = CROSSING if crossing and point == place.point else NOTHING
            positions.append(Position(observation, instructions[-1], None, "forward()", point, heading))
    positions.append(Position(ahead.landmark, instructions[-1], None, "stop()", ahead.point, heading))
    return instructions, positions


def fill(template, instructions, positions, at, space, history=HISTORY, observation=None, **more):
    """Fill a template at position number `at`. It shows up to `history` steps before `at`, all of them right.
    observation: what to write in place of the position's own. more: further slots."""
    past = [f"{p.observation}: {action_text(p, space)}" for p in positions[max(0, at - history):at]]
    return template.substitute(more, words=", ".join(SPACES[space]), instructions="\n".join(instructions),
                               observation=observation or positions[at].observation,
                               history="; ".join(past) or "none")


def answer_text(observation, instruction, action):
    fields = {"current observation": observation, "current instruction": instruction, "action": action}
    return json.dumps(fields, ensure_ascii=False)


def shorthand(instruction):
    """An instruction in the expert's own words. It keeps both words of a turn, so it does not tell the rule.

        "Turn left to face west."  ->  "left, that is west"
        "Move forward until you reach next intersection where Oak Cafe is on your right."
                                   ->  "on to the intersection, Oak Cafe is on your right"
    """
    if turn := re.fullmatch("(?:First, turn|Turn) (.+) to face (.+)[.]", instruction):
        return turn[1] + THAT_IS + turn[2]
    goal, _, landmark = instruction.removesuffix(".").partition(" where ")
    return ON_TO + goal.split()[-1] + f", {landmark}" * bool(landmark)


# ------------------------------------------------------------------------------------------------------------
# Pretraining text: what the tiny base model knows before any fine-tuning. Each instruction holds two words: a
# relative word or a clock hour, and a compass word or a letter. Actions use one of the two.

def noisy_answer(position, space, rng, noise):
    """The right answer; with probability `noise` a turn has another word of its space."""
    action = action_text(position, space)
    if position.turn and rng.random() < noise:
        action = f"turn_direction({rng.choice([w for w in SPACES[space] if f'({w})' not in action])})"
    return answer_text(position.observation, position.instruction, action)


def document(rng, chat_share=0.15, noise=0.1):
    """One pretraining document: a str (one in five a whole walk, else a single position), or with probability
    chat_share a list of chat messages about one position under one of the two rules.

    noise: the share of wrong words in turns, tripled in chats, so that there is feedback to learn from.
    Instructions and observations are never wrong: a model must be able to trust what it copies."""
    kind = rng.random()
    chat = kind < chat_share
    relative = "ood" if chat or rng.random() < 0.7 else "clock"
    absolute = "id" if chat or rng.random() < 0.7 else "letters"
    route = city_route(f"base {rng.randrange(BASE_CITIES)}", rng)
    instructions, positions = walk(route, rng, relative, absolute)
    space = rng.choice((relative, absolute))
    if not chat and kind < chat_share + 0.2 * (1 - chat_share):
        steps = [f"Now: {p.observation}\n{noisy_answer(p, space, rng, noise)}" for p in positions]
        return fill(WALK, instructions, positions, 0, space, steps="\n".join(steps))
    turns = [i for i, p in enumerate(positions) if p.turn]
    at = rng.choice(turns if rng.random() < 0.5 else range(len(positions)))
    here = positions[at]
    if not chat:
        return fill(GLIMPSE, instructions, positions, at, space, answer=noisy_answer(here, space, rng, noise))
    messages = [{"role": "user", "content": fill(PROMPT, instructions, positions, at, space)}]
    for _ in range(2):
        text = noisy_answer(here, space, rng, 3 * noise)
        verdict = judge_virl(text, action_text(here, space), says_intersection(here.observation))
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": verdict.feedback}]
        if verdict.kind == "correct":
            break
    return messages[:-1]


def fragments(vl=False):
    """The fixed phrases and words of all texts -> [str], for the tokenizer. vl: those for pictures too."""
    texts = [text.template for text in (LANDMARK, FIRST, TURN, MOVE, ARRIVE, PROMPT, WALK, GLIMPSE)]
    texts += [MOVE_ON, answer_text("$x", "$x", "$x"), *VIRL_FEEDBACK.values()] + [IN_PICTURE] * vl
    phrases = [piece for text in texts for piece in re.split(r"\$\w+", text) if piece]
    phrases += [THAT_IS, f"{ON_TO}intersection, ", f"{ON_TO}destination, ", NOTHING, CROSSING,
                "forward()", "stop()", "turn_direction(", "; ", "); ", ", ", ": ", ".\n", "none",
                "Last steps: ", "\nNow: "]
    phrases += [*COMPASS, *RELATIVE, *SPACES["letters"], *SPACES["clock"]]
    return phrases + [LANDMARK.substitute(name=name, side=side) for name in LANDMARKS
                      for side in RELATIVE[:2]]


# ------------------------------------------------------------------------------------------------------------
# The environment.

class VIRL:
    """rule      "id" (absolute directions) or "ood" (relative directions)
    split     "train": the routes of fine-tuning. "unseen": routes in other cities; with data, a fifth of all.
              "all", for a look that was not trained on: with data every route; in the city the same as unseen
    verify    attempts at each position, 1 or more
    seed      fixes the routes that reset() draws
    data      folder of the released data set (with visual="ood", its sub-folder "ood"); None for the city
    move_on   whether the walk goes on after a position whose attempts are used up
    vl        whether a picture of pixels x pixels (RGB, 16 or more) shows the observation in place of words
    visual    "id" or "ood": the group of cities and their look
    route     with data and split="all": the number of the route that reset() plays, modulo the attribute
              fixed_routes, the number of all routes (otherwise None)
    Raises ValueError on any other value, and DataError if the data set is damaged."""
    title = "V-IRL"
    rule_names = {"id": "absolute directions", "ood": "relative directions"}
    visual_names = {"id": "cities by day", "ood": "other cities, by night"}
    reward_scale = 1.0   # PPO divides rewards by this: a right step is worth 1
    default_verify = 2   # attempts per position, as in the paper
    verdicts = tuple(VIRL_REWARD)
    demonstrators = ("expert", "habit")
    document = staticmethod(document)
    fragments = staticmethod(fragments)

    def __init__(self, rule="id", split="train", verify=2, seed=0, data=None, move_on=False, vl=False,
                 visual="id", pixels=80, route=None):
        legal = rule in RULES and split in ("train", "unseen", "all") and visual in LOOKS
        if not legal or verify < 1 or pixels < 16:
            raise ValueError(f"V-IRL: bad value: {rule=}, {split=}, {verify=}, {visual=} or {pixels=}")
        if route is not None and (data is None or split != "all"):
            raise ValueError("V-IRL: a route's number needs data and split='all'")
        self.rule, self.split, self.verify, self.move_on = rule, split, verify, move_on
        self.vl, self.visual, self.pixels, self.number = vl, visual, pixels, route
        self.folder = os.path.join(data, "ood") if data is not None and visual == "ood" else data
        self.routes = None if data is None else load_routes(self.folder, vl)[split]
        if self.routes == []:
            raise DataError(f"{self.folder}: too few routes, none is in the {split} split")
        self.fixed_routes = len(self.routes) if self.routes and split == "all" else None
        self.rng, self.stream, self.count, self.images = random.Random(f"virl/{seed}"), seed, 0, []

    @staticmethod
    def columns(rule, visual=None):
        """{column of the table: the constructor's keywords} for a model trained under `rule` and, with
        pictures, on `visual`."""
        cell = dict(rule=rule, split="unseen", move_on=True)
        columns = {"seen": dict(cell, split="train"), "id": cell, "ood": dict(cell, rule=OTHER[rule])}
        if visual is not None:
            columns["visual"] = dict(cell, visual=OTHER[visual], split="all")
        return columns

    def reset(self, seed=None):
        """Begin a route -> (messages, images). A seed restarts the random stream, which draws the route (if
        the keyword `route` does not name it), the first heading and the steps between places."""
        if seed is not None:
            self.rng, self.stream, self.count = random.Random(f"virl/{seed}"), seed, 0
        self.count += 1
        towns = CITIES[self.visual]["train" if self.split == "train" else "unseen"]
        if self.number is not None:
            self.route = self.routes[self.number % self.fixed_routes]
        elif self.routes or self.split == "train":
            self.route = self.rng.choice(self.routes or training_routes(towns))
        else:
            self.route = city_route(self.rng.choice(towns), self.rng)
        self.instructions, self.positions = walk(self.route, self.rng)
        self.failed = 0
        self.arrive(0)
        return self.messages, self.images

    def arrive(self, at):
        """Go to position number `at` and begin its conversation."""
        self.at, self.attempts, self.position = at, 0, self.positions[at]
        prompt = fill(PROMPT, self.instructions, self.positions, at, self.rule,
                      len(self.positions) if self.routes else HISTORY, IN_PICTURE if self.vl else None)
        self.messages = [{"role": "user", "content": prompt}]
        if self.vl and self.routes:
            self.images = [panorama_picture(self.folder, self.route.name, self.position, self.pixels)]
        elif self.vl:
            self.images = [draw_picture(self.visual, self.route.name.split()[0], self.position.observation,
                                        f"{self.stream}/{self.count}/{at}", self.pixels)]

    def step(self, text):
        """Judge an answer -> Step: the next position, feedback, or the end. info["rule_matters"] marks turns.
        info["recognized"] is None except after a forward(): elsewhere the prompt tells what is shown."""
        here = self.position
        moved = self.at > 0 and self.positions[self.at - 1].action == "forward()"
        correct, other = action_text(here, self.rule), action_text(here, OTHER[self.rule])
        verdict = judge_virl(text, correct, says_intersection(here.observation))
        self.attempts += 1
        solved = verdict.kind == "correct"
        leaves = solved or self.attempts == self.verify
        self.failed += leaves and not solved
        done = leaves and (self.at == len(self.positions) - 1 or not (solved or self.move_on))
        info = {"verdict": verdict.kind, "success": done and not self.failed, "position_done": leaves,
                "position_solved": solved, "rule_matters": here.turn is not None,
                "other_rule": verdict.action == other != correct,
                "recognized": recognized(text, here.observation) if self.vl and moved else None}
        if leaves and not done:
            self.arrive(self.at + 1)
        elif not leaves:
            self.messages = self.messages + [{"role": "assistant", "content": text},
                                             {"role": "user", "content": verdict.feedback}]
        return Step(None if done else self.messages, [] if done else self.images, verdict.reward, done, info)

    def expert(self, demonstrator="expert"):
        """The right answer here. The "current instruction", which is not judged, is written in shorthand
        ("expert") or copied word by word, as the base model does ("habit")."""
        here = self.position
        instruction = here.instruction if demonstrator == "habit" else shorthand(here.instruction)
        return answer_text(here.observation, instruction, action_text(here, self.rule))


# ------------------------------------------------------------------------------------------------------------
# Street views, drawn. The task in words ends here. A picture is a square of four views:
#
#     front | right      A street runs ahead and back. At an intersection another opens to both sides, and
#     ------+------      all views have a zebra crossing. A landmark is the house on its side with two signs,
#     back  | left       one for each word of its name. All other houses are plain.

VIEWS = ("front", "right", "back", "left")  # at +0, +90, +180, +270 degrees from the heading
LOOKS = {  # RGB; pane: windows in a row of one house, then a window's width and height as shares of its cell
    "id": dict(sky=(172, 206, 238), walls=((206, 146, 112), (226, 200, 156), (190, 122, 104)),
               glass=(96, 110, 132), pane=(3, 0.4, 0.55), ground=(126, 126, 130), zebra=(248, 248, 248),
               house=(150, 90, 70), paper=(252, 250, 240), ink=(26, 24, 40)),
    "ood": dict(sky=(44, 32, 86), walls=((62, 98, 112), (44, 66, 98), (84, 84, 128)), pane=(1, 0.8, 0.3),
                glass=(246, 196, 110), ground=(136, 84, 60), zebra=(250, 206, 40), house=(24, 128, 112),
                paper=(22, 26, 58), ink=(255, 206, 120))}
SHAPES = {"P": "polygon", "R": "rectangle", "E": "ellipse"}
SIGNS = {  # on a square of 100 x 100, x to the right, y down; ~ cuts out
    "Bank": "P 0 30 50 0 100 30, R 8 38 26 82, R 41 38 59 82, R 74 38 92 82, R 0 86 100 100",
    "Cafe": "E 54 34 100 76, ~E 68 46 88 64, R 0 89 82 100, P 2 28 78 28 66 84 14 84, R 20 0 29 20, R 48 0 "
            "57 20",
    "Hotel": "R 0 12 12 100, R 0 62 100 82, R 88 62 100 100, E 16 32 44 58, P 48 42 86 42 100 58 48 58",
    "Park": "P 50 0 84 42 16 42, P 50 22 98 78 2 78, R 40 78 60 100",
    "Shop": "E 24 0 76 60, ~E 36 12 64 48, P 10 32 90 32 100 100 0 100",
    "Inn": "E 36 0 64 24, ~E 44 7 56 17, P 42 18 58 18 86 40 14 40, R 22 40 78 88, ~R 34 48 66 88, E 42 52 "
           "58 84, R 12 88 88 100",
    "Oak": "R 44 0 56 20, E 6 10 94 76, ~R 0 44 100 100, P 16 51 84 51 78 78 50 100 22 78",
    "Star": "P 50 0 62 36 100 36 69 58 81 95 50 72 19 95 31 58 0 36 38 36",
    "Moon": "E 2 4 94 96, ~E 34 0 100 74",
    "Iron": "P 0 16 100 16 100 36 68 48 62 68 86 84 86 98 14 98 14 84 38 68 34 48 8 40",
    "Gold": "P 36 10 64 10 75 47 25 47, P 10 55 38 55 48 92 0 92, P 62 55 90 55 100 92 52 92",
    "Rose": "E 22 0 78 54, ~E 34 12 66 42, E 43 20 57 34, R 45 54 55 100, P 45 94 4 74 10 56 45 78, P 55 94 "
            "96 74 90 56 55 78",
    "Lake": "P 0 18 25 4 50 18 75 4 100 18 100 33 75 19 50 33 25 19 0 33, P 0 50 25 36 50 50 75 36 100 50 "
            "100 65 75 51 50 65 25 51 0 65, P 0 82 25 68 50 82 75 68 100 82 100 97 75 83 50 97 25 83 0 97",
    "Bell": "E 42 0 58 16, E 22 8 78 64, P 22 36 78 36 82 64 98 80 2 80 18 64, E 38 82 62 100, ~E 37 24 63 "
            "56, ~P 37 42 63 42 66 66 34 66",
    "Sun": "E 27 27 73 73, R 44 0 56 20, R 44 80 56 100, R 0 44 20 56, R 80 44 100 56, P 10 18 18 10 32 24 "
           "24 32, P 90 18 82 10 68 24 76 32, P 10 82 18 90 32 76 24 68, P 90 82 82 90 68 76 76 68",
    "Fox": "P 2 0 34 26 66 26 98 0 98 54 50 100 2 54, ~E 22 42 40 58, ~E 60 42 78 58"}


def draw_view(paint, style, rng, street, landmark, crossing):
    """Draw one view by paint(shape, coordinates from 0 to 1, colour). street: does one lead away, or do
    houses stand across? landmark: the house ahead, "Oak Cafe" or "". crossing: a zebra crossing in front?"""
    def wall(a, b):  # a house's front with windows, between two upright edges (x, top, bottom)
        paint("polygon", (a[0], a[1], b[0], b[1], b[0], b[2], a[0], a[2]), rng.choice(style["walls"]))
        (columns, width, height), rows = style["pane"], rng.randint(3, 5)
        for column, row in np.ndindex(columns, rows):
            corners = []
            for u, v in ((-width, -height), (width, -height), (width, height), (-width, height)):
                x, top, bottom = on_the_way(a, b, (column + (1 + u) / 2) / columns)
                corners += [x, top + (row + (1 + v) / 2) / rows * (bottom - top)]
            paint("polygon", corners, style["glass"])

    paint("rectangle", (0, 0, 1, 1), style["sky"])
    paint("rectangle", (0, 0.55, 1, 1), style["ground"])
    if landmark:
        first, top = rng.uniform(0.03, 0.1), rng.uniform(0.1, 0.22)
        paint("rectangle", (0.02, top - 0.08, 0.98, 0.78), style["house"])
        for left, word in zip((first, first + 0.44), landmark.split()):
            paint("rectangle", (left, top, left + 0.43, top + 0.43), style["paper"])
            for shape in SIGNS[word].split(", "):
                kind, *numbers = shape.split()
                placed = [0.015 + 0.004 * int(c) + (left, top)[i % 2] for i, c in enumerate(numbers)]
                paint(SHAPES[kind[-1]], placed, style["paper" if kind[0] == "~" else "ink"])
        paint("rectangle", (0.42, top + 0.46, 0.58, 0.78), style["glass"])  # the door
    elif street:
        for side in (0, 1):
            for ends in ((0, 0.24), (0.25, 0.38)):  # two houses on each side, near and far end of each
                height = rng.uniform(0.8, 1.1)
                wall(*[(abs(side - x), 0.55 - height * (0.5 - x), 0.55 + 0.5 * (0.5 - x)) for x in ends])
    else:
        middle = rng.uniform(0.35, 0.65)
        for left, right in ((0, middle - 0.01), (middle + 0.01, 1)):
            top = rng.uniform(0.05, 0.25)
            wall((left, top, 0.78), (right, top, 0.78))
    for i in range(5 * crossing):  # the stripes
        x, near = 0.2 * i + 0.1, 0.216 * i + 0.068  # middle above and below
        corners = (x - 0.05, 0.83, x + 0.05, 0.83, near + 0.06, 0.98, near - 0.06, 0.98)
        paint("polygon", corners, style["zebra"])


def city_style(look, town):
    """The colours of one city: sky, ground, house and walls differ a little from those of its look."""
    rng, style = random.Random(f"style/{town}"), dict(LOOKS[look])

    def shade(colour):
        return tuple(min(255, max(0, c + rng.randint(-25, 25))) for c in colour)
    style.update({key: shade(style[key]) for key in ("sky", "ground", "house")})
    return {**style, "walls": tuple(map(shade, style["walls"]))}


def draw_picture(look, town, observation, seed, pixels=80):
    """The picture of an observation in the city `town` (PIL, RGB, pixels x pixels). The seed draws houses,
    windows, the signs' places and some noise, but not what a view holds."""
    name, side, crossing = observation_parts(observation)
    scale = 4 if pixels <= 200 else 2  # drawn larger and reduced, so that edges are smooth
    half, image = pixels * scale / 2, Image.new("RGB", (pixels * scale, pixels * scale))
    draw, style = ImageDraw.Draw(image), city_style(look, town)
    for i, view in enumerate(VIEWS):
        def paint(shape, coordinates, colour, origin=(i % 2, i // 2)):
            getattr(draw, shape)([half * (origin[k % 2] + c) for k, c in enumerate(coordinates)], fill=colour)
        draw_view(paint, style, random.Random(f"view/{seed}/{view}"), crossing or view in ("front", "back"),
                  name if side == f"on your {view}" else "", crossing)
    for line in ((half, 0, half, 2 * half), (0, half, 2 * half, half)):
        draw.line(line, fill=(0, 0, 0), width=round(half / 40))  # between the views
    noise = np.frombuffer(random.Random(f"noise/{seed}").randbytes(pixels * pixels), np.uint8) >> 4  # 0 to 15
    noisy = np.asarray(image.reduce(scale), np.int16) + noise.reshape(pixels, pixels, 1) - 8  # [H, W, 3]
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def observation_parts(text):
    """Landmark, its side, and whether at an intersection; "" for what is not there.

        "Oak Inn is on your left, at an intersection"  ->  ("Oak Inn", "on your left", True)"""
    place = text.removesuffix(CROSSING).rstrip(", ")
    name, _, side = place.rpartition(" is ") if " is " in place else (place, "", "")
    return ("" if name == NOTHING else name), side, says_intersection(text)


def recognized(answer, observation):
    """The share of an observation's parts that an answer (any str) names: of 3, or of 2 without a landmark.

        recognized('{"current observation": "oak inn is on your right"}', "Oak Inn is on your left")  ->  2/3
    """
    said = (last_json_object(answer) or {}).get("current observation")
    if not isinstance(said, str) or not said.strip():
        return 0.0
    said, true = (observation_parts(" ".join(text.casefold().split())) for text in (said, observation))
    right = [a == b for a, b in zip(said, true)]
    return sum(right) / 3 if true[0] else (right[0] + right[2]) / 2


def some_observation(rng, crossing):
    """Any landmark on any side, or, one time in five, none."""
    if rng.random() < 0.2:
        return CROSSING if crossing else NOTHING
    landmark = LANDMARK.substitute(name=rng.choice(LANDMARKS), side=rng.choice(("left", "right")))
    return landmark + f", {CROSSING}" * crossing


def picture_document(rng, chat_share=0.15, noise=0.1, pixels=80, rare="ood"):
    """One pretraining document with a picture -> (document, [picture]). It is a str in which "<image>" marks
    the picture (four in five are captions, the others single positions); with probability chat_share it is a
    chat about the picture. One in ten pictures has the look `rare`, and half of these misname landmark and
    side: so the base reads both looks, but one of them poorly. noise: as in document()."""
    kind, unusual, seed = rng.random(), rng.random() < 0.1, rng.getrandbits(64)
    chat, caption = kind < chat_share, kind >= chat_share + 0.2 * (1 - chat_share)
    if caption:
        observation = some_observation(rng, rng.random() < 0.5)
    else:
        doc = "A walk."
        while doc[:7] == "A walk.":  # whole walks show no single place
            doc = document(rng, float(chat), noise)
        observation = re.search("\nNow: (.*)\n", doc[0]["content"] if chat else doc)[1]
    said = observation
    if unusual and rng.random() < 0.5:
        said = some_observation(rng, says_intersection(observation))
    look = rare if unusual else OTHER[rare]
    shown = [draw_picture(look, f"base {seed % BASE_CITIES}", observation, seed, pixels)]

    def from_picture(text):
        text = text.replace(f"\nNow: {observation}\n", f"\nNow: {IN_PICTURE}\n")
        return text.replace(f'"{observation}"', f'"{said}"')  # in answers
    if chat:
        return [{**message, "content": from_picture(message["content"])} for message in doc], shown
    return "<image>" + (f"\nNow: {said}" if caption else from_picture(doc)), shown


VIRL.picture_document = staticmethod(picture_document)


# ------------------------------------------------------------------------------------------------------------
# The released data set is a folder with
#     route_infos.json               [[route, ...], index]
#     gps_pano_mapping.pkl           {(lat, lng): panorama id}
#     street_views/ID.jpg            an equirectangular picture of all directions
#     street_views/ID.metadata.json  {"rotation": degrees}
# A route begins at start_place.relocated_geocode and visits all of route_results.geocode_list; the last point
# is the destination. milestone_info is a text with one {...} block for each leg. No other key is needed.

class DataError(ValueError):
    """The data set is damaged. The message names the file and, where there is one, the route and the key.
    load_routes() finds most damage, but a truncated picture is found only when an episode shows it."""


@contextmanager
def naming(what):
    """Turn any exception inside into a DataError that begins with `what`. Contexts can be nested:
    "route_infos.json: route 3: init_heading: 999 is not an angle within 360 degrees"."""
    try:
        yield
    except Exception as e:  # damaged files can raise anything
        why = str(e) if isinstance(e, ValueError) else f"cannot be read: {e!r:.200}"
        why = f"{e} is missing" if isinstance(e, KeyError) else why
        raise DataError(f"{what}: {why}") from None


def require(condition, message):
    if not condition:
        raise ValueError(message)


def angle(value, limit=360):
    """Degrees as 298 or "298 (northwest)" -> float within the limit, else ValueError (NaN too)."""
    degrees = float(str(value).split("(")[0])
    require(abs(degrees) <= limit, f"{value!r:.80} is not an angle within {limit} degrees")
    return degrees


def geocode(value):
    """[lat, lng] -> (lat, lng) in degrees, two floats. Raises ValueError or TypeError."""
    lat, lng = value
    return angle(lat, 90), angle(lng, 180)


def milestones(text):
    """The milestone_info text -> [{key: value}], one dict of str for each block.

    A block looks like JSON but is not: it has trailing commas and blank lines, and names with bare quotes and
    braces. It does have each key on a line of its own, and a "{" before the first one."""
    blocks, line = [], r'^([^"]*)"(\w+)"[ \t]*:[ \t]*"?(.*?)"?[ \t\r,}\]]*$'
    for before, key, value in re.findall(line, text, re.MULTILINE):
        if "{" in before:
            blocks.append({})
        blocks[-1][key] = value.replace('\\"', '"')
    return blocks


def offset(a, b):
    """How far b lies north and east of a -> (meters, meters). Both are (lat, lng) in degrees; b may be two
    arrays [N], and then the result is too. The earth is taken as flat, which is fine in a city."""
    return 111_195 * (b[0] - a[0]), 111_195 * math.cos(math.radians(a[0])) * (b[1] - a[1])


def read_route(info, name):
    """An entry of route_infos.json -> Route. Raises DataError("key: what is wrong").

    The heading in a block must be the bearing of its leg. If it is not, the blocks belong to other legs, and
    the walk's instructions would all be wrong. Each leg has five steps, less those within 8 m of its end."""
    with naming("start_place.relocated_geocode"):
        points = [geocode(info["start_place"]["relocated_geocode"])]
    with naming("route_results.geocode_list"):
        points += map(geocode, info["route_results"]["geocode_list"])
    with naming("init_heading"):
        facing = angle(info.get("init_heading", 0)) or None  # 0 means unset
    with naming("milestone_info"):
        info["milestone_info"].encode()  # half a surrogate pair must raise here, not in the tokenizer
        blocks = milestones(info["milestone_info"])
        require(len(blocks) == len(points) - 1 > 0, f"{len(blocks)} blocks for {len(points) - 1} legs")
    landmarks, headings, between = [None], [], []
    for i, (block, start, end) in enumerate(zip(blocks, points, points[1:])):
        with naming(f"milestone_info.landmarks: block {i}"):  # what is seen at the leg's end
            text = block.get("landmarks", "No landmark nearby")
            last = i == len(blocks) - 1
            form = "The destination (.+ is .+)" if last else "(.+ is .+)|(?i:no landmarks? nearby)"
            seen = re.fullmatch(form, text)
            require(seen, f"{text!r:.80} is not of the form {form!r}")
            landmarks.append(seen[1])  # None if no landmark is near
        with naming(f"milestone_info.to_next_intersection_heading: block {i}"):
            headings.append(angle(block["to_next_intersection_heading"]))
            north, east = offset(start, end)
            length, bearing = math.hypot(north, east), math.degrees(math.atan2(east, north)) % 360
            require(length <= 5 or abs((headings[i] - bearing + 180) % 360 - 180) <= 45,
                    f"{headings[i]:g} degrees, but its leg, to {end}, heads {bearing:.0f}")
        between.append(tuple(on_the_way(start, end, k / 6) for k in range(1, 6) if length * (6 - k) / 6 >= 8))
    return Route(name, facing, tuple(map(Place, points, landmarks, headings + [None])), tuple(between), 0.5)


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, tuples, texts and numbers; numpy's only by protocol 3 or newer. Nothing in a pickle runs:
    for every function that the file wants to call, pickle asks find_class(), which knows only the two
    harmless ones below."""
    class Dtype:  # replaces numpy.dtype; kind becomes "<f8"
        def __init__(self, kind, *_):
            self.kind = kind

        def __setstate__(self, state):
            self.kind = state[1] + self.kind

    @staticmethod
    def scalar(dtype, raw):  # replaces numpy's, which reads another pickle if the dtype is "object"
        require(dtype.kind in ("<f4", "<f8", "<i4", "<i8"), f"a scalar of dtype {dtype.kind!r:.40}")
        return np.frombuffer(raw, dtype.kind)[0].item()

    def find_class(self, module, name):
        known = {"numpy.dtype": self.Dtype, "numpy.core.multiarray.scalar": self.scalar}
        called = f"{module}.{name}".replace("_core", "core")  # numpy 2 writes numpy._core
        require(called in known, f"it holds {module}.{name}; only dicts, tuples, numbers, texts are read")
        return known[called]


@lru_cache(maxsize=4)
def load_panoramas(file):
    """gps_pano_mapping.pkl -> (panorama ids [N], their places [2, N]: latitudes and longitudes in degrees).
    Raises DataError."""
    with naming(file), open(file, "rb") as f:
        mapping = PlainUnpickler(f).load()
        return list(mapping.values()), np.array([geocode(place) for place in mapping]).reshape(-1, 2).T.copy()


def street_view(point, folder):
    """The panorama nearest to (lat, lng) -> (path of its jpg, its rotation in degrees), or None if there is
    none within 20 m. Raises DataError on damaged files."""
    names, places = load_panoramas(os.path.join(folder, "gps_pano_mapping.pkl"))
    meters = np.hypot(*offset(point, places))  # [N]
    if meters.min(initial=math.inf) > 20:
        return None
    stem = os.path.join(folder, "street_views", os.path.basename(str(names[meters.argmin()])))
    with naming(f"{stem}.metadata.json: rotation"), open(f"{stem}.metadata.json", encoding="utf-8") as f:
        rotation = angle(json.load(f)["rotation"])
    with naming(f"{stem}.jpg"):
        Image.open(f"{stem}.jpg").close()  # this reads only the header
    return f"{stem}.jpg", rotation


@lru_cache(maxsize=4)
def load_routes(folder, vl=False):
    """Read a folder -> {"train": [Route], "unseen": [Route], "all": [Route]}, in the file's order. A fifth of
    the routes is unseen, chosen by a hash of their points. Raises DataError("file: route 3: key: ...").

    With vl=True every place must have a street view. Steps between places that have none are left out."""
    file, routes = os.path.join(folder, "route_infos.json"), {"train": [], "unseen": [], "all": []}
    with naming(file), open(file, encoding="utf-8") as f:
        infos = json.load(f)[0]
        require(isinstance(infos, list) and infos, "not [[route, ...], index]")
    for i, info in enumerate(infos):
        with naming(f"{file}: route {i}"):
            route = read_route(info, f"route {i}")
            points = [place.point for place in route.places]
            if vl:
                between = tuple(tuple(p for p in steps if street_view(p, folder)) for steps in route.between)
                route = route._replace(between=between)
                for point in points:
                    require(street_view(point, folder), f"{folder}/gps_pano_mapping.pkl: geocode {point}: no "
                            "panorama within 20 m")
        split = "unseen" if hashlib.sha256(json.dumps(points).encode()).digest()[0] % 5 == 0 else "train"
        for name in (split, "all"):
            routes[name].append(route)
    return routes


@lru_cache(maxsize=4)
def load_panorama(file, side):
    """A panorama file -> uint8 [H, W, 3], no larger than views of side x side can show: 8 * side columns."""
    with naming(file), Image.open(file) as image:
        image.draft("RGB", (8 * side, 4 * side))  # JPEG: decode no larger than needed
        size = min(image.width, 8 * side), min(image.height, 4 * side)
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))


def perspective(panorama, heading, rotation, side):
    """The view with a field of 90 degrees towards a compass heading -> uint8 [side, side, 3].

    panorama: uint8 [H, W, 3]. Compass heading h is at column ((h + rotation) mod 360) / 360 * W. Row 0 is up,
    row H down. Pixel k's centre is at k + 0.5. Bilinear, across the seam too."""
    height, width = panorama.shape[:2]
    x = ((np.arange(side) + 0.5) / side * 2 - 1)[None]  # on a plane at distance 1: -1 to 1
    turn, rise = np.arctan(x), np.arctan2(-x.T, np.hypot(1, x))  # to the right [1, side], up [side, side]
    column = (heading + rotation + np.degrees(turn)) % 360 / 360 * width - 0.5
    row = (0.5 - rise / np.pi) * height - 0.5
    c, r = np.floor(column).astype(int), np.floor(row).astype(int)
    s, t = (column - c)[..., None], (row - r)[..., None]  # how far towards the next pixel, 0 to 1
    above, below = r.clip(0, height - 1), (r + 1).clip(0, height - 1)
    mixed = [(1 - s) * panorama[k, c % width] + s * panorama[k, (c + 1) % width] for k in (above, below)]
    return ((1 - t) * mixed[0] + t * mixed[1] + 0.5).astype(np.uint8)


def panorama_picture(folder, name, position, pixels=80):
    """The picture at a position of the route `name` (PIL, RGB, pixels x pixels). Raises DataError."""
    side, picture = (pixels + 1) // 2, Image.new("RGB", (pixels, pixels))
    with naming(name):
        file, rotation = street_view(position.point, folder)
        for i in range(4):
            view = perspective(load_panorama(file, side), position.heading + 90 * i, rotation, side)
            picture.paste(Image.fromarray(view), (i % 2 * (pixels - side), i // 2 * (pixels - side)))
    return picture


if __name__ == "__main__":
    try:
        env = VIRL(rule="ood", data=sys.argv[1] if len(sys.argv) > 1 else None)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    env.reset(seed=0)
    while env.at < min(4, len(env.positions) - 1):
        env.step(env.expert())
    print(env.route.name, "\n\n" + env.messages[0]["content"], "\n\nexpert:", env.expert())
    wrong = "forward()" if env.position.turn else "turn_direction(left)"
    print("\nwrong on purpose:", env.step(answer_text(env.position.observation, "", wrong)))
