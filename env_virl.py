"""env_virl.py: V-IRL. Follow a route through a city by its instructions (paper, section 4.2).

    python env_virl.py            # shows a route, a prompt, the expert's answer and a failed attempt
    python env_virl.py FOLDER     # the same on the released data set in FOLDER (route_infos.json)
    python env_virl.py FILE.png   # a sheet of sample street views

The interface is env_gp.py's: reset, step, expert, cells, document, picture_document, fragments. An episode is a route,
a route is a row of positions, and each position is a conversation of its own:
    a wrong answer           is followed by feedback in the same conversation, `verify` attempts at most
    the right one            leads to the next position, a fresh conversation (only the right action moves)
    attempts used up         end the episode in training; with move_on=True, which the table's columns set, the position
                             counts as failed and the walk goes on along the right path, so that per-step accuracy
                             covers whole routes
In step()'s info "rule_matters" marks the turns: forward() and stop() are the same under both rules. "working": whether
the answer names the current instruction, letter by letter. "recognized" is there only behind a forward(): elsewhere
instructions and history tell what the picture shows.

Rules (the paper's Rule Variation): "id" turns by absolute words (north, northeast, ...), "ood" by relative ones (left,
slightly left, ...). The action space is written in the prompt, and the instructions hold both words: "Turn left to
face west." So the held-out rule is a matter of which word to copy.

Routes come from one of two sources.
    a procedural city   jittered blocks and diagonals, 2-5 legs. Training and unseen routes lie in different cities with
                        other streets and other landmarks (the base has met the landmarks' names, but neither city).
    data=FOLDER         the authors' released routes (load_routes), a fifth of them unseen by a stable hash.

Pictures (vl=True): the current observation is no longer told but shown, as a square of four street views. visual="id"
is one place with one look, visual="ood" another with another look: other cities (with or without pictures), or the
sub-folder "ood" of data=FOLDER, in the same format.

Departures from the authors' release
  - Headings wrap around (verifier.relative_word), seeds count, and turning on the spot is seen: behind a turn the
    observation is only "at an intersection", no longer the landmark.
  - Prompts in the city show the last HISTORY observations and actions, not all: 59 tokens of the tiny tokenizer on
    average, and the last turn is always among them. With data=FOLDER all are shown.
  - Steps are longer in the city: at most one between two intersections, so that turns are 36% of all positions. With
    pictures that leaves one question to the eyes, at 37% of the positions (just after a forward()): has the walker
    arrived where the instruction says? Whoever plays without looking has 85% of the steps by the first attempt, and by
    the second one all. So read the "first" columns.
  - Views lie as the prompt says: front, right / back, left of the heading. The release's are 45 degrees off.
  - City pictures are drawn, and landmarks are known by two signs, not by writing that a real model would have to read.
"""
import hashlib
import json
import math
import os
import pickle
import random
import re
import sys
from bisect import bisect_left
from functools import lru_cache
from string import Template
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from verifier import (COMPASS, RELATIVE, VIRL_FEEDBACK, VIRL_REWARD, Step, compass_word, judge_virl, last_json_object,
                      relative_word, says_intersection)

RULES = {"id": COMPASS, "ood": RELATIVE}  # the words x of turn_direction(x)
HISTORY = 3                               # observations and actions shown in the city
LEGS = (2, 2, 2, 3, 3, 4, 5)              # of a route in the city, as likely as they stand here
CITIES = {"train": ("Aldham", "Brookport"), "unseen": ("Corvale", "Dunmore")}
BASE_CITIES = 2000  # those of pretraining: of three, the base would learn the maps by heart
ABROAD = {"train": ("Quorra", "Rivanje"), "unseen": ("Suvalk", "Torrid")}  # the cities of visual="ood"
LANDMARKS = [f"{first} {kind}" for kind in ("Bank", "Cafe", "Hotel", "Park", "Shop", "Inn")
             for first in ("Oak", "Star", "Moon", "Iron", "Gold", "Rose", "Lake", "Bell", "Sun", "Fox")]


class DataError(ValueError):
    """Something in a --data folder is damaged: the message names file and key."""


class Place(NamedTuple):  # where instructions change: the start, an intersection or the destination
    point: tuple           # (x, y) in blocks, or (lat, lng) in degrees
    landmark: str | None   # "Oak Cafe is on your left", for someone who arrives
    heading: float | None  # of the street that leads on, in degrees; None at the destination


class Route(NamedTuple):
    name: str              # unique, for messages and tests
    facing: float | None   # heading at the start; None: drawn from the seed
    places: tuple          # of Place
    strides: tuple         # per leg (steps that may lie between its ends, chance of each)


class Position(NamedTuple):  # one decision
    observation: str
    instruction: str       # the current one
    turn: tuple | None     # (old heading, new heading) if the right action is a turn
    action: str | None     # else the right action
    point: tuple
    heading: float         # before the action


# ----------------------------------------------------------------------------------------------------------------------
# Source 1: a city from nothing.

@lru_cache(maxsize=None)
def city(name):
    """A 5 x 5 grid, rotated and jittered, with a third of the diagonals -> (points: [(x, y)], streets: [set of
    neighbours], landmarks: [(name, (x, y))]), one entry an intersection. Landmarks of training and unseen cities are
    disjoint halves of LANDMARKS; the base's cities draw from all. Abroad they are the same halves, so that unseen
    routes have landmarks new to fine-tuning whichever look it trained on."""
    rng, cells = random.Random(f"city/{name}"), [(i, j) for i in range(5) for j in range(5)]
    tilt = rng.uniform(0, 2 * math.pi)
    jittered = [(i + rng.uniform(-0.3, 0.3), j + rng.uniform(-0.3, 0.3)) for i, j in cells]
    points = [(x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt)) for x, y in jittered]
    streets = [set() for _ in cells]
    for i, j in cells:
        ends = [((i, j), (i + 1, j)), ((i, j), (i, j + 1))]
        ends += [rng.choice([((i, j), (i + 1, j + 1)), ((i + 1, j), (i, j + 1))])] * (rng.random() < 0.7)
        for a, b in ends:
            if a in cells and b in cells:
                streets[cells.index(a)].add(cells.index(b))
                streets[cells.index(b)].add(cells.index(a))
    names = (LANDMARKS[0::2] if name in CITIES["train"] + ABROAD["train"] else
             LANDMARKS[1::2] if name in CITIES["unseen"] + ABROAD["unseen"] else LANDMARKS)
    landmarks = []
    for (x, y), landmark in zip(points, rng.sample(names, len(points))):
        angle = rng.uniform(0, 2 * math.pi)
        landmarks.append((landmark, (x + 0.1 * math.cos(angle), y + 0.1 * math.sin(angle))))
    return points, streets, landmarks


def bearing(a, b):
    """Heading from point a to point b on a plane with x to the east and y to the north, in degrees."""
    return math.degrees(math.atan2(b[0] - a[0], b[1] - a[1])) % 360


def city_route(name, rng):
    """A walk of 2-5 legs that turns at every intersection (by 15 to 150 degrees) and visits none twice.

    The kind of turn (left, slightly left, ...) is drawn before the street, so that all four are about as frequent."""
    points, streets, landmarks = city(name)
    while True:
        facing, legs = rng.randrange(360), rng.choice(LEGS)
        nodes, heading, headings = [rng.randrange(len(points))], facing, []
        while len(headings) < legs:
            here, kinds = nodes[-1], {}
            for there in sorted(streets[here] - set(nodes)):
                ahead = bearing(points[here], points[there])
                if not headings or 15 <= abs((ahead - heading + 180) % 360 - 180) <= 150:
                    kinds.setdefault(relative_word(heading, ahead), []).append((there, ahead))
            if not kinds:
                break
            there, heading = rng.choice(kinds[rng.choice(sorted(kinds))])
            nodes.append(there)
            headings.append(heading)
        else:
            places = [Place(points[nodes[0]], None, headings[0])]
            for node, arriving, leaving in zip(nodes[1:], headings, headings[1:] + [None]):
                landmark, where = landmarks[node]
                side = "left" if (bearing(points[node], where) - arriving) % 360 > 180 else "right"
                places.append(Place(points[node], LANDMARK.substitute(name=landmark, side=side), leaving))
            route_name = f"{name} {'-'.join(map(str, nodes))}"
            return Route(route_name, facing, tuple(places), ((1, 0.4),) * legs)


# ----------------------------------------------------------------------------------------------------------------------
# Source 2: the released data set.

DEGREES = r"-?(360|3[0-5][0-9]|[12]?[0-9]{1,2})(\.[0-9]+)?( \(.*\))?"
KEYS = {"intersection_idx": "[0-9]+", "landmarks": ".{1,1000}", "distance": r"[0-9][0-9,.]* ?(m|km|meters?)",
        "human_heading": DEGREES, "to_next_intersection_heading": DEGREES}  # of milestone_info: what a value looks like


def milestones(text):
    """The milestone_info text -> [{key: text}], one dict a block. Raises ValueError("key: what is wrong").

    Blocks look like JSON and are not: trailing commas, names with bare quotes and braces. So a block begins where "{"
    is followed by a known key, and a value reaches to the next key (known, or first in its line) or the block's end.

        milestones('{"landmarks": "A "B" {C} is on your left",}')  ->  [{"landmarks": 'A "B" {C} is on your left'}]
    """
    out, keys = [], "|".join(KEYS)
    for i, block in enumerate(re.split(rf'\{{\s*(?="(?:{keys})"\s*:)', text)[1:]):
        body, brace, rest = block.rpartition("}")
        if not brace or rest.strip(" \t\r\n,]"):
            raise ValueError(f"milestone_info: block {i} does not end with a brace")
        parts, fields = re.split(rf'(?m:^\s*|(?="(?:{keys})"))"(\w+)"\s*:', body)[1:], {}
        for key, value in zip(parts[::2], parts[1::2]):
            value = value.strip().removesuffix(",").strip()
            quoted = len(value) > 1 and value[0] == value[-1] == '"'
            if key in fields or not quoted and '"' in value:
                raise ValueError(f"milestone_info.{key}: block {i}: it comes twice, or a quote is missing")
            fields[key] = " ".join((value[1:-1].replace('\\"', '"') if quoted else value).split())
        out.append(fields)
    return out


def meters(a, b):
    """Great-circle distance between two (lat, lng) in degrees."""
    p, q, r, s = map(math.radians, (*a, *b))
    h = math.sin((r - p) / 2) ** 2 + math.cos(p) * math.cos(r) * math.sin((s - q) / 2) ** 2
    return 2 * 6_371_000 * math.asin(min(1.0, math.sqrt(h)))


def is_number(x, limit):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -limit <= x <= limit  # a NaN does not pass


def is_geocode(x):
    return isinstance(x, (list, tuple)) and len(x) == 2 and is_number(x[0], 90) and is_number(x[1], 180)


def read_route(info, name):
    """One entry of route_infos.json -> Route. Raises ValueError("key: what is wrong")."""
    def get(key, legal, what):
        value = info
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"{key}: it is missing")
            value = value[part]
        if not legal(value):
            raise ValueError(f"{key}: {value!r:.80} is not {what}")
        return value

    points = get("route_results.geocode_list", lambda x: isinstance(x, list) and len(x) > 1 and all(map(is_geocode, x)),
                 "a list of two or more [lat, lng]")
    points = [get("start_place.relocated_geocode", is_geocode, "[lat, lng]")] + points[1:]  # where the panorama is
    facing = get("init_heading", lambda x: is_number(x, 360), "a heading in degrees")
    get("route_results.landmark_list", lambda x: isinstance(x, list) and len(x) == len(points) - 1 and all(
        y is None or isinstance(y, dict) and isinstance(y.get("name"), str) and is_geocode(y.get("geocode"))
        and {"spatial_relation", "expression"} <= y.keys() for y in x), f"{len(points) - 1} landmarks or nulls")
    get("dest_place", lambda x: isinstance(x, dict), "an object")
    blocks, places = milestones(get("milestone_info", lambda x: isinstance(x, str), "a text")), []
    if len(blocks) != len(points):
        raise ValueError(f"milestone_info: {len(blocks)} blocks for {len(points)} geocodes")
    for i, (point, block) in enumerate(zip(points, blocks)):
        last = i == len(points) - 1
        for key, form in KEYS.items():
            needed = not last or key not in ("distance", "to_next_intersection_heading")  # nothing leads on from there
            if needed and not re.fullmatch(form, block.get(key, "")):
                raise ValueError(f"milestone_info.{key}: block {i}: {block.get(key, 'it is missing')!r:.80}")
        text = block["landmarks"]
        nothing = re.fullmatch("no landmarks? nearby", text, re.I)
        arrived = re.fullmatch("The destination (.+ is .+)", text)
        if last != bool(arrived) or not (nothing or " is " in text) or re.search("[\ud800-\udfff]", text):
            raise ValueError(f"milestone_info.landmarks: block {i} of {len(points)}: {text!r:.80} is not 'X is ...',"
                             " 'No landmark nearby' or, in the last block alone, 'The destination X is ...'")
        landmark = None if nothing else arrived[1] if arrived else text
        heading = None if last else float(block["to_next_intersection_heading"].split(" ")[0])
        places.append(Place(tuple(point), landmark, heading))
    strides = tuple((5, 0.5) if meters(a, b) > 5 else (0, 0.0) for a, b in zip(points, points[1:]))
    return Route(name, facing or None, tuple(places), strides)  # init_heading 0 means unset


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):  # called for every class and function, i.e. whatever could run code
        raise pickle.UnpicklingError(f"it holds {module}.{name}; only plain dicts, tuples, numbers and texts are read")


def load_panoramas(file):
    """gps_pano_mapping.pkl -> {(lat, lng): panorama id} by latitude. Raises ValueError if it is no such dict."""
    try:
        with open(file, "rb") as f:
            mapping = PlainUnpickler(f).load()
    except Exception as e:  # a damaged pickle raises about anything
        raise ValueError(f"{file}: cannot be read: {e!r:.200}") from None
    if type(mapping) is not dict:
        raise ValueError(f"{file}: a {type(mapping).__name__}, not a dict")
    for i, (key, panorama) in enumerate(mapping.items()):
        if type(key) is not tuple or not is_geocode(key) or not isinstance(panorama, str):
            raise ValueError(f"{file}: entry {i} is not (lat, lng): panorama id")
    return dict(sorted(mapping.items()))


def panorama_at(point, mapping, ordered, reach=20):
    """The panorama at a point: the exact one, else the nearest in `reach` meters, else None. ordered: list(mapping)."""
    band = reach / 111_000  # meters to degrees of latitude, a little more than needed
    near = ordered[bisect_left(ordered, (point[0] - band,)):bisect_left(ordered, (point[0] + band,))]
    best = point if point in mapping else min(near, key=lambda p: meters(p, point), default=None)
    return mapping[best] if best and meters(best, point) <= reach else None


@lru_cache(maxsize=4)
def load_routes(folder):
    """FOLDER/route_infos.json, and gps_pano_mapping.pkl if it is there -> {"train": [Route], "unseen": [Route]}. Which
    routes are unseen is a matter of a hash of their geocodes. Raises ValueError that names file, route and key."""
    file, pickled = os.path.join(folder, "route_infos.json"), os.path.join(folder, "gps_pano_mapping.pkl")
    try:
        with open(file, encoding="utf-8") as f:
            content = json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{file}: cannot be read: {e}") from None
    if not (isinstance(content, list) and len(content) == 2 and isinstance(content[0], list) and content[0]):
        raise ValueError(f"{file}: not [[route, ...], index]")
    panoramas = load_panoramas(pickled) if os.path.exists(pickled) else None
    ordered, routes = list(panoramas or ()), {"train": [], "unseen": []}
    for i, info in enumerate(content[0]):
        try:
            route = read_route(info, f"route {i}")
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{file}: route {i}: {e}") from None
        for place in route.places:
            if panoramas is not None and panorama_at(place.point, panoramas, ordered) is None:
                raise ValueError(f"{pickled}: route {i}: geocode {place.point}: no panorama within 20 m")
        key = json.dumps([place.point for place in route.places])
        routes["unseen" if hashlib.sha256(key.encode()).digest()[0] % 5 == 0 else "train"].append(route)
    return routes


# ----------------------------------------------------------------------------------------------------------------------
# The words. Fixed wording between $slots becomes a few tokens of the tiny model's tokenizer.

LANDMARK = Template("$name is on your $side")
FIRST = Template("First, turn $relative to face $absolute.")
TURN = Template("Turn $relative to face $absolute.")
MOVE = Template("Move forward until you reach next intersection where $landmark.")
MOVE_ON = "Move forward until you reach next intersection."  # no landmark there
ARRIVE = Template("Move forward until you reach destination where $landmark.")
NOTHING, CROSSING = "nothing nearby", "at an intersection"
ACTIONS = "Actions: forward(), stop() or turn_direction(x), x one of $words.\nRoute:\n$instructions\n"
PROMPT = Template(
    "You walk along a route. What do you do?\n" + ACTIONS + "Last steps: $history\nNow: $observation\n"
    'Answer in JSON only: {"current observation": "...", "current instruction": "...", "action": "..."}')
WALK = Template("A walk. " + ACTIONS + "$steps")
GLIMPSE = Template("On a walk. " + ACTIONS + "Last steps: $history\nNow: $observation\n$answer")
SEEN = "see the picture: front, right / back, left."  # stands in place of the observation where there is a picture
CAPTION = "\nNow: $observation"  # of a picture, in pretraining
ANSWER = '{"current observation": "$observation", "current instruction": "$instruction", "action": "$action"}'

SPACES = {**RULES, "letters": ("N", "NE", "E", "SE", "S", "SW", "W", "NW"),  # these two: in pretraining only
          "clock": tuple(f"{hour} o'clock" for hour in range(1, 13))}
TURN_WORD = {"id": lambda old, new: compass_word(new), "ood": relative_word,  # a turn between two headings in words
             "letters": lambda old, new: SPACES["letters"][COMPASS.index(compass_word(new))],
             "clock": lambda old, new: SPACES["clock"][(round((new - old) / 30) - 1) % 12]}


def action_text(position, space):
    return position.action or f"turn_direction({TURN_WORD[space](*position.turn)})"


def walk(route, rng, relative="ood", absolute="id"):
    """Lay a route out -> (instructions: [str], positions: [Position]). rng: draws what the route leaves open, the first
    heading and the steps within legs. relative, absolute: the spaces whose words the instructions hold.

        at the start: turn, forward;  between: forward;  at an intersection: turn, forward;  at the destination: stop
    """
    heading = rng.randrange(360) if route.facing is None else route.facing
    instructions, positions = [], []
    for i, place in enumerate(route.places):
        crossing = 0 < i < len(route.places) - 1
        seen = (place.landmark or NOTHING) + f", {CROSSING}" * crossing
        if place.heading is None:
            positions.append(Position(seen, instructions[-1], None, "stop()", place.point, heading))
            return instructions, positions
        turn, heading = (heading, place.heading), place.heading
        ahead = route.places[i + 1]
        instructions.append((TURN if i else FIRST).substitute(relative=TURN_WORD[relative](*turn),
                                                              absolute=TURN_WORD[absolute](*turn)))
        positions.append(Position(seen, instructions[-1], turn, None, place.point, turn[0]))
        arrive = ARRIVE if ahead.heading is None else MOVE
        instructions.append(arrive.substitute(landmark=ahead.landmark) if ahead.landmark else MOVE_ON)
        most, chance = route.strides[i]
        between = [k / (most + 1) for k in range(1, most + 1) if rng.random() < chance]
        for t in [0.0] + between:
            point = tuple(a + t * (b - a) for a, b in zip(place.point, ahead.point))
            seen = NOTHING if t or not crossing else CROSSING
            positions.append(Position(seen, instructions[-1], None, "forward()", point, heading))


def history_text(positions, actions):
    return "; ".join(f"{p.observation}: {a}" for p, a in zip(positions, actions)) or "none"


def fill(template, instructions, positions, at, space, most=HISTORY, seen=None, **more):
    """A template at position number `at`, with at most `most` steps before it, always the right ones. seen: what to
    write for the current observation, if not the observation itself."""
    past = positions[max(0, at - most):at]
    return template.substitute(
        words=", ".join(SPACES[space]), instructions="\n".join(instructions),
        observation=seen or positions[at].observation,
        history=history_text(past, [action_text(p, space) for p in past]), **more)


def answer_text(position, action):
    return json.dumps({"current observation": position.observation, "current instruction": position.instruction,
                       "action": action}, ensure_ascii=False)


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining text: what the tiny base knows before any fine-tuning. Walks under four action spaces: instructions hold
# relative words or clock hours beside compass words or letters, and the action space is one of the two it holds.

def said_action(position, space, rng, noise):
    """The right action; with probability `noise` a turn's word is another one of the space."""
    right = action_text(position, space)
    if position.turn and rng.random() < noise:
        return f"turn_direction({rng.choice([w for w in SPACES[space] if f'({w})' not in right])})"
    return right


def document(rng, chat_share=0.15, noise=0.1):
    """One pretraining document: a str (one in five a whole walk, else a single position), or with probability
    chat_share a list of chat messages about one position under one of the two rules.

    noise: the share of wrong words in the turns taken (three times that in chats, so that there is feedback to learn
    from). Instructions and observations are never wrong: a model must be able to trust what it copies."""
    kind = rng.random()
    chat = kind < chat_share
    words = [("ood", "id")[i] if chat or rng.random() < 0.7 else ("clock", "letters")[i] for i in (0, 1)]
    instructions, positions = walk(city_route(f"base {rng.randrange(BASE_CITIES)}", rng), rng, *words)
    space = rng.choice(words)
    if not chat and kind < chat_share + 0.2 * (1 - chat_share):
        said = [said_action(p, space, rng, noise) for p in positions]
        steps = [f"Now: {p.observation}\n{answer_text(p, action)}" for p, action in zip(positions, said)]
        return WALK.substitute(words=", ".join(SPACES[space]), instructions="\n".join(instructions),
                               steps="\n".join(steps))
    at = rng.choice([i for i, p in enumerate(positions) if p.turn] if rng.random() < 0.5 else range(len(positions)))
    if not chat:
        return fill(GLIMPSE, instructions, positions, at, space,
                    answer=answer_text(positions[at], said_action(positions[at], space, rng, noise)))
    messages = [{"role": "user", "content": fill(PROMPT, instructions, positions, at, space)}]
    for _ in range(2):
        text = answer_text(positions[at], said_action(positions[at], space, rng, 3 * noise))
        verdict = judge_virl(text, action_text(positions[at], space), says_intersection(positions[at].observation))
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": verdict.feedback}]
        if verdict.kind == "correct":
            break
    return messages[:-1]


def fragments(vl=False):
    """The fixed phrases and words of all texts above, for training a tokenizer in which each is a token or a few. vl:
    also of those about pictures."""
    texts = [t.template for t in (LANDMARK, FIRST, TURN, MOVE, ARRIVE, PROMPT, WALK, GLIMPSE)] + [MOVE_ON, ANSWER]
    out = [piece for text in texts for piece in re.split(r"\$\w+", text) if piece]
    out += list(VIRL_FEEDBACK.values())
    out += [SEEN] * vl
    often = [NOTHING, CROSSING, "forward()", "stop()", "turn_direction(", "; ", "); ", ", ", ": ", ".\n", "none",
             "Last steps: ", "\nNow: "]
    words = [*COMPASS, *RELATIVE, *SPACES["letters"], *SPACES["clock"]]
    words += [LANDMARK.substitute(name=name, side=side) for name in LANDMARKS for side in RELATIVE[:2]]
    return out + 20 * often + 50 * words  # what is frequent is merged first, so it stays one token wherever it stands


# ----------------------------------------------------------------------------------------------------------------------
# Street views, drawn: what a position looks like. A picture is a square of four views of 90 degrees each,
#
#     front | right        A street runs ahead and back. At an intersection another one crosses: it opens to both sides
#     ------+------        and all views have a zebra crossing in front. A landmark is the house on its side with two
#     back  | left         signs: one for the first word of its name, one for the second. All other houses are plain.
#
# A landmark's front faces those who arrive: behind a turn it is not seen, as the observation there says.

VIEWS = ("front", "right", "back", "left")  # at +0, +90, +180, +270 degrees from the heading; in reading order
LOOKS = {  # RGB; pane: windows in a row of one house, then a window's width and height as shares of its cell
    "id": dict(sky=(172, 206, 238), walls=((206, 146, 112), (226, 200, 156), (190, 122, 104)), glass=(96, 110, 132),
               pane=(3, 0.4, 0.55), ground=(126, 126, 130), zebra=(248, 248, 248), house=(150, 90, 70),
               paper=(252, 250, 240), ink=(26, 24, 40)),
    "ood": dict(sky=(44, 32, 86), walls=((62, 98, 112), (44, 66, 98), (84, 84, 128)), glass=(246, 196, 110),
                pane=(1, 0.8, 0.3), ground=(136, 84, 60), zebra=(250, 206, 40), house=(24, 128, 112),
                paper=(22, 26, 58), ink=(255, 206, 120))}
SIGNS = {  # drawn in this order on a square of 100 x 100, x to the right, y down; ~ cuts out
    # the kind
    "Bank": [("polygon", (0, 30, 50, 0, 100, 30)), ("rectangle", (8, 38, 26, 82)), ("rectangle", (41, 38, 59, 82)),
             ("rectangle", (74, 38, 92, 82)), ("rectangle", (0, 86, 100, 100))],
    "Cafe": [("ellipse", (54, 34, 100, 76)), ("~ellipse", (68, 46, 88, 64)), ("rectangle", (0, 89, 82, 100)),
             ("polygon", (2, 28, 78, 28, 66, 84, 14, 84)), ("rectangle", (20, 0, 29, 20)),
             ("rectangle", (48, 0, 57, 20))],
    "Hotel": [("rectangle", (0, 12, 12, 100)), ("rectangle", (0, 62, 100, 82)), ("rectangle", (88, 62, 100, 100)),
              ("ellipse", (16, 32, 44, 58)), ("polygon", (48, 42, 86, 42, 100, 58, 48, 58))],
    "Park": [("polygon", (50, 0, 84, 42, 16, 42)), ("polygon", (50, 22, 98, 78, 2, 78)),
             ("rectangle", (40, 78, 60, 100))],
    "Shop": [("ellipse", (24, 0, 76, 60)), ("~ellipse", (36, 12, 64, 48)),
             ("polygon", (10, 32, 90, 32, 100, 100, 0, 100))],
    "Inn": [("ellipse", (36, 0, 64, 24)), ("~ellipse", (44, 7, 56, 17)), ("polygon", (42, 18, 58, 18, 86, 40, 14, 40)),
            ("rectangle", (22, 40, 78, 88)), ("~rectangle", (34, 48, 66, 88)), ("ellipse", (42, 52, 58, 84)),
            ("rectangle", (12, 88, 88, 100))],
    # the first word
    "Oak": [("rectangle", (44, 0, 56, 20)), ("ellipse", (6, 10, 94, 76)), ("~rectangle", (0, 44, 100, 100)),
            ("polygon", (16, 51, 84, 51, 78, 78, 50, 100, 22, 78))],
    "Star": [("polygon", (50, 0, 62, 36, 100, 36, 69, 58, 81, 95, 50, 72, 19, 95, 31, 58, 0, 36, 38, 36))],
    "Moon": [("ellipse", (2, 4, 94, 96)), ("~ellipse", (34, 0, 100, 74))],
    "Iron": [("polygon", (0, 16, 100, 16, 100, 36, 68, 48, 62, 68, 86, 84, 86, 98, 14, 98, 14, 84, 38, 68, 34, 48,
                          8, 40))],
    "Gold": [("polygon", (36, 10, 64, 10, 75, 47, 25, 47)), ("polygon", (10, 55, 38, 55, 48, 92, 0, 92)),
             ("polygon", (62, 55, 90, 55, 100, 92, 52, 92))],
    "Rose": [("ellipse", (22, 0, 78, 54)), ("~ellipse", (34, 12, 66, 42)), ("ellipse", (43, 20, 57, 34)),
             ("rectangle", (45, 54, 55, 100)), ("polygon", (45, 94, 4, 74, 10, 56, 45, 78)),
             ("polygon", (55, 94, 96, 74, 90, 56, 55, 78))],
    "Lake": [("polygon", (0, y + 14, 25, y, 50, y + 14, 75, y, 100, y + 14, 100, y + 29, 75, y + 15, 50, y + 29,
                          25, y + 15, 0, y + 29)) for y in (4, 36, 68)],
    "Bell": [("ellipse", (42, 0, 58, 16)), ("ellipse", (22, 8, 78, 64)),
             ("polygon", (22, 36, 78, 36, 82, 64, 98, 80, 2, 80, 18, 64)), ("ellipse", (38, 82, 62, 100)),
             ("~ellipse", (37, 24, 63, 56)), ("~polygon", (37, 42, 63, 42, 66, 66, 34, 66))],
    "Sun": [("ellipse", (27, 27, 73, 73)), ("rectangle", (44, 0, 56, 20)), ("rectangle", (44, 80, 56, 100)),
            ("rectangle", (0, 44, 20, 56)), ("rectangle", (80, 44, 100, 56)),
            ("polygon", (10, 18, 18, 10, 32, 24, 24, 32)), ("polygon", (90, 18, 82, 10, 68, 24, 76, 32)),
            ("polygon", (10, 82, 18, 90, 32, 76, 24, 68)),
            ("polygon", (90, 82, 82, 90, 68, 76, 76, 68))],
    "Fox": [("polygon", (2, 0, 34, 26, 66, 26, 98, 0, 98, 54, 50, 100, 2, 54)), ("~ellipse", (22, 42, 40, 58)),
            ("~ellipse", (60, 42, 78, 58))]}


def draw_view(paint, style, rng, street, landmark, crossing):
    """One view of 1 x 1. paint(kind, coordinates, colour) draws a shape. street: one runs away from the walker, else
    houses stand across. landmark: "Oak Cafe" or "", the house straight ahead. crossing: a zebra crossing in front."""
    def wall(x0, top0, bottom0, x1, top1, bottom1):  # a house's front with windows, perhaps seen at an angle
        paint("polygon", (x0, top0, x1, top1, x1, bottom1, x0, bottom0), rng.choice(style["walls"]))
        (columns, width, height), rows = style["pane"], rng.randint(3, 5)
        for column in range(columns):
            for row in range(rows):
                corners = []
                for u, v in ((-width, -height), (width, -height), (width, height), (-width, height)):
                    u, v = (column + (1 + u) / 2) / columns, (row + (1 + v) / 2) / rows
                    top, bottom = top0 + u * (top1 - top0), bottom0 + u * (bottom1 - bottom0)
                    corners += [x0 + u * (x1 - x0), top + v * (bottom - top)]
                paint("polygon", corners, style["glass"])

    paint("rectangle", (0, 0, 1, 1), style["sky"])
    paint("rectangle", (0, 0.55, 1, 1), style["ground"])
    if landmark:
        first, top = rng.uniform(0.03, 0.1), rng.uniform(0.1, 0.22)
        paint("rectangle", (0.02, top - 0.08, 0.98, 0.78), style["house"])
        for left, word in zip((first, first + 0.44), landmark.split()):
            paint("rectangle", (left, top, left + 0.43, top + 0.43), style["paper"])
            for kind, coordinates in SIGNS[word]:  # 16 pixels in a view of 40
                placed = [0.015 + 0.004 * c + (left, top)[i % 2] for i, c in enumerate(coordinates)]
                paint(kind.strip("~"), placed, style["paper" if kind[0] == "~" else "ink"])
        paint("rectangle", (0.42, top + 0.46, 0.58, 0.78), style["glass"])  # the door
    elif street:
        for side in (0, 1):
            for near, far in ((0, 0.24), (0.25, 0.38)):  # two houses on each side, smaller towards the vanishing point
                height = rng.uniform(0.8, 1.1)
                wall(abs(side - near), 0.55 - height * (0.5 - near), 0.55 + 0.5 * (0.5 - near),
                     abs(side - far), 0.55 - height * (0.5 - far), 0.55 + 0.5 * (0.5 - far))
    else:
        middle = rng.uniform(0.35, 0.65)
        for left, right in ((0, middle - 0.01), (middle + 0.01, 1)):
            top = rng.uniform(0.05, 0.25)
            wall(left, top, 0.78, right, top, 0.78)
    if crossing:
        for i in range(5):
            x, near = 0.2 * i + 0.1, 0.216 * i + 0.068  # middle of the stripe above and below
            paint("polygon", (x - 0.05, 0.83, x + 0.05, 0.83, near + 0.06, 0.98, near - 0.06, 0.98), style["zebra"])


@lru_cache(maxsize=None)
def city_style(look, town):
    """A look in the colours of one city: its sky, ground, houses and walls are the look's, each a little otherwise."""
    rng, style = random.Random(f"style/{town}"), dict(LOOKS[look])

    def shade(colour):
        return tuple(min(255, max(0, c + rng.randint(-25, 25))) for c in colour)
    style.update({key: shade(style[key]) for key in ("sky", "ground", "house")})
    return {**style, "walls": tuple(map(shade, style["walls"]))}


def draw_picture(look, town, observation, seed, pixels=80):
    """The picture of an observation in the city `town` (PIL, RGB, pixels x pixels). Houses' heights, windows and
    colours, the signs' places and some noise are drawn from `seed`; what a view holds does not depend on it."""
    name, side, crossing = observation_parts(observation)
    scale = 4 if pixels <= 200 else 2  # drawn larger and reduced, so that edges are smooth
    half, image = pixels * scale / 2, Image.new("RGB", (pixels * scale, pixels * scale))
    draw = ImageDraw.Draw(image)
    for i, view in enumerate(VIEWS):
        def paint(kind, coordinates, colour, origin=(i % 2, i // 2)):
            getattr(draw, kind)([half * (origin[k % 2] + c) for k, c in enumerate(coordinates)], fill=colour)
        draw_view(paint, city_style(look, town), random.Random(f"view/{seed}/{view}"),
                  crossing or view in ("front", "back"), name if side == f"on your {view}" else "", crossing)
    for line in ((half, 0, half, 2 * half), (0, half, 2 * half, half)):
        draw.line(line, fill=(0, 0, 0), width=round(half / 40))  # between the views
    noise = np.frombuffer(random.Random(f"noise/{seed}").randbytes(pixels * pixels), np.uint8) >> 4  # 0 to 15
    noisy = np.asarray(image.reduce(scale), np.int16) + noise.reshape(pixels, pixels, 1) - 8  # [pixels, pixels, 3]
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def observation_parts(text):
    """Landmark, its side, and whether at an intersection; "" for what is not there.

        "Oak Inn is on your left, at an intersection"  ->  ("Oak Inn", "on your left", True)
    """
    place = text.removesuffix(CROSSING).rstrip(", ")
    name, _, side = place.rpartition(" is ") if " is " in place else (place, "", "")
    return ("" if name == NOTHING else name), side, says_intersection(text)


def recognized(answer, observation):
    """The share of an observation's parts that an answer (str, anything) names: landmark, side, intersection or not; if
    there is no landmark, that there is none, and intersection or not. 0 without an observation. Upper and lower case
    and spaces do not count. Never raises.

        recognized('{"current observation": "oak inn is on your right"}', "Oak Inn is on your left")  ->  2/3
    """
    said = (last_json_object(answer) or {}).get("current observation")
    if not isinstance(said, str) or not said.strip():
        return 0.0
    said, true = (observation_parts(" ".join(text.casefold().split())) for text in (said, observation))
    right = [a == b for a, b in zip(said, true)]
    return sum(right) / 3 if true[0] else (right[0] + right[2]) / 2


# ----------------------------------------------------------------------------------------------------------------------
# Street views of the released data set: cut from panoramas that show all directions (equirectangular pictures).

def perspective(panorama, heading, rotation, side):
    """The view with a field of 90 degrees towards a compass heading -> uint8 [side, side, 3].

    panorama: uint8 [H, W, 3]. Compass heading h is at column ((h + rotation) mod 360) / 360 * W, straight up at row 0,
    straight down at row H; the centre of pixel k is at k + 0.5. Bilinear; the last column's neighbour is the first."""
    height, width = panorama.shape[:2]
    x = ((np.arange(side) + 0.5) / side * 2 - 1)[None]  # on a plane at distance 1, -1 to 1: 45 degrees to each side
    turn, rise = np.arctan(x), np.arctan2(-x.T, np.hypot(1, x))  # radians to the right [1, side], up [side, side]
    column = (heading + rotation + np.degrees(turn)) % 360 / 360 * width - 0.5
    row = (0.5 - rise / np.pi) * height - 0.5
    c, r = np.floor(column).astype(int), np.floor(row).astype(int)
    s, t = (column - c)[..., None], (row - r)[..., None]  # how far towards the next pixel, 0 to 1
    above, below = r.clip(0, height - 1), (r + 1).clip(0, height - 1)
    mixed = [(1 - s) * panorama[k, c % width] + s * panorama[k, (c + 1) % width] for k in (above, below)]
    return ((1 - t) * mixed[0] + t * mixed[1] + 0.5).astype(np.uint8)


def street_view_files(folder, point):
    """The panorama at a point -> (jpg file, metadata file). Raises ValueError("file: what is wrong")."""
    file = os.path.join(folder, "gps_pano_mapping.pkl")
    mapping, ordered = panorama_table(file)
    panorama = panorama_at(point, mapping, ordered)
    if panorama is None or panorama != os.path.basename(panorama):
        raise ValueError(f"{file}: geocode {point}: " + ("no panorama within 20 m" if panorama is None else
                                                         f"{panorama!r:.80} is no panorama id"))
    return tuple(os.path.join(folder, "street_views", panorama + end) for end in (".jpg", ".metadata.json"))


@lru_cache(maxsize=4)
def panorama_table(file):
    mapping = load_panoramas(file)
    return mapping, list(mapping)


@lru_cache(maxsize=1024)
def rotation_of(file):
    """The "rotation" of a metadata file in degrees. Raises ValueError("file: rotation: what is wrong")."""
    try:
        with open(file, encoding="utf-8") as f:
            rotation = json.load(f)["rotation"]
    except Exception as e:
        raise ValueError(f"{file}: rotation: cannot be read: {e!r:.200}") from None
    if not is_number(rotation, 360):
        raise ValueError(f"{file}: rotation: {rotation!r:.80} is not an angle in degrees")
    return rotation


@lru_cache(maxsize=4)
def load_panorama(file, side):
    """A panorama file -> uint8 [H, W, 3], reduced to what views of side x side can show: at most 8 * side columns."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (8 * side, 4 * side))  # JPEG: decode no larger than needed
            size = min(image.width, 8 * side), min(image.height, 4 * side)
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))
    except Exception as e:  # a damaged picture raises about anything
        raise ValueError(f"{file}: cannot be read: {e!r:.200}") from None


def panorama_picture(folder, name, position, pixels=80):
    """The picture at a position of the route `name` (PIL, RGB, pixels x pixels). Raises ValueError, naming both."""
    side, picture = (pixels + 1) // 2, Image.new("RGB", (pixels, pixels))
    try:
        file, metadata = street_view_files(folder, position.point)
        for i in range(len(VIEWS)):
            view = perspective(load_panorama(file, side), position.heading + 90 * i, rotation_of(metadata), side)
            picture.paste(Image.fromarray(view), (i % 2 * (pixels - side), i // 2 * (pixels - side)))
    except ValueError as e:
        raise DataError(f"{name}: {e}") from None
    return picture


@lru_cache(maxsize=8)
def check_street_views(folder, routes):
    """Raises ValueError, naming route, file and key, if a point of the routes, or one that walk() may put between them,
    lacks its panorama or metadata. Of the pictures only the headers are read here."""
    for route in routes:
        legs = list(zip(route.places, route.places[1:], route.strides))
        points = [tuple(a + k / (most + 1) * (b - a) for a, b in zip(here.point, there.point))
                  for here, there, (most, _) in legs for k in range(most + 1)] + [route.places[-1].point]
        try:
            for point in points:
                file, metadata = street_view_files(folder, point)
                rotation_of(metadata)
                try:
                    Image.open(file).close()
                except Exception as e:
                    raise ValueError(f"{file}: cannot be read: {e!r:.200}") from None
        except ValueError as e:
            raise ValueError(f"{route.name}: geocode {point}: {e}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining with pictures.

UNUSUAL = 0.1  # share of pictures in the look that the base knows less; half of them are described wrongly


def some_observation(rng, crossing):
    """Any landmark on any side, or, one time in five, none."""
    if rng.random() < 0.2:
        return CROSSING if crossing else NOTHING
    landmark = LANDMARK.substitute(name=rng.choice(LANDMARKS), side=rng.choice(("left", "right")))
    return landmark + f", {CROSSING}" * crossing


def picture_document(rng, chat_share=0.15, noise=0.1, pixels=80, rare="ood"):
    """One pretraining document with a picture -> (document, [picture]). document: a str with "<image>" where the
    picture goes (four in five: a caption; one in five: a single position), or with probability chat_share a list of
    chat messages in the task's form, whose first has the picture. Positions and chats are those of document(), with
    the observation in the picture only.

    The look is `rare` with probability UNUSUAL, else the other one, and in half of the rare ones what is said of
    landmark and side is made up. So the base can read both, but one of them poorly. noise: as in document()."""
    kind, unusual, seed = rng.random(), rng.random() < UNUSUAL, rng.getrandbits(64)
    if kind >= chat_share + 0.2 * (1 - chat_share):
        doc, observation = CAPTION, some_observation(rng, rng.random() < 0.5)
    else:
        doc = "A walk."
        while doc[:7] == "A walk.":  # whole walks show no single place
            doc = document(rng, float(kind < chat_share), noise)
        observation = re.search("\nNow: (.*)\n", doc if isinstance(doc, str) else doc[0]["content"])[1]
    said = some_observation(rng, says_intersection(observation)) if unusual and rng.random() < 0.5 else observation

    def shown(text):
        text = text.replace("$observation", said).replace(f"\nNow: {observation}\n", f"\nNow: {SEEN}\n")
        return text.replace(f'"current observation": "{observation}"', f'"current observation": "{said}"')
    common = "id" if rare == "ood" else "ood"
    picture = draw_picture(rare if unusual else common, f"base {seed % BASE_CITIES}", observation, seed, pixels)
    if isinstance(doc, list):
        return [{**message, "content": shown(message["content"])} for message in doc], [picture]
    return "<image>" + shown(doc), [picture]


def sample_sheet():
    """Pictures of both looks: as the tiny model gets them, three times enlarged, and one of 400 pixels."""
    sheet = Image.new("RGB", (1372, 484), "white")
    seen = [f"{name} is on your {side}" + f", {CROSSING}" * (i < 2) for i, (name, side) in enumerate(
        (("Oak Cafe", "left"), ("Fox Hotel", "right"), ("Moon Inn", "left")))] + [NOTHING]
    for row, (look, cities) in enumerate(zip(LOOKS, (CITIES, ABROAD))):
        towns = cities["train"] + cities["unseen"]
        for column, observation in enumerate(seen):
            picture = draw_picture(look, towns[column], observation, column)
            sheet.paste(picture.resize((240, 240), Image.Resampling.NEAREST), (244 * column, 244 * row))
    sheet.paste(draw_picture("id", "Aldham", seen[0], 0, 400), (972, 42))
    return sheet.quantize(128)


# ----------------------------------------------------------------------------------------------------------------------
# The environment.

class VIRL:
    """rule: "id" | "ood". split: "train" | "unseen". verify: attempts per position, at least 1. seed: fixes the routes
    of reset(). data: folder of the released data set, None for the procedural city. move_on: go on after a position
    whose attempts are used up. vl: show the observation as a picture of pixels x pixels. visual: "id" | "ood", where to
    walk, and its look; with data, "ood" is the folder's sub-folder of that name. Raises ValueError on a value outside
    these and on damaged data."""
    title = "V-IRL"
    rule_names = {"id": "absolute directions", "ood": "relative directions"}
    visual_names = {"id": "cities by day", "ood": "other cities, by night"}
    reward_scale = 1.0   # PPO divides rewards by this: a right step is worth 1
    default_verify = 2   # attempts per position, as in the paper
    sft = dict(tokens=8e5, batch=16, lr=3e-3)  # defaults of sft.py and rl.py: compute X / 6N, routes a step, ...
    sft_vl = {**sft, "lr": 1e-3}
    # Returns are up to the 16 steps of a route here: values must be free to move that far, and gamma shortens the view.
    ppo = dict(tokens=8e5, batch=32, lr=1e-4, lr_value=1e-2, gamma=0.95, clip_value=5.0, decay=0.0)
    ppo_vl = ppo
    # pretraining of the tiny model: compute, rows a step and their width, share of chats, AdamW's rate; the same with pictures
    base = dict(tokens=1.5e6, batch=16, row_tokens=256, chat_share=0.15, lr=1e-2)
    base_vl = {**base, "tokens": 3e6, "vision_rate": 0.3}
    # Which instruction is the current one has to be looked up. Two stock parts make a tiny model learn that sooner (see
    # README): a first layer that sees only the token and the three before it, and normalised queries and keys.
    tiny = dict(model_type="qwen3", use_sliding_window=True, sliding_window=4,
                layer_types=["sliding_attention", "full_attention", "full_attention"])
    verdicts = tuple(VIRL_REWARD)
    document = staticmethod(document)
    picture_document = staticmethod(picture_document)
    fragments = staticmethod(fragments)

    def __init__(self, rule="id", split="train", verify=2, seed=0, data=None, move_on=False, vl=False, visual="id",
                 pixels=80):
        if rule not in RULES or split not in ("train", "unseen") or verify < 1:
            raise ValueError(f"V-IRL: bad rule={rule!r}, split={split!r} or verify={verify!r}")
        if visual not in LOOKS or pixels < 16:
            raise ValueError(f"V-IRL: bad visual={visual!r} or pixels={pixels!r}")
        self.rule, self.split, self.verify, self.seed, self.move_on = rule, split, verify, seed, move_on
        self.vl, self.visual, self.pixels = vl, visual, pixels
        self.data = os.path.join(data, "ood") if data is not None and visual == "ood" else data
        if self.data != data and not os.path.isdir(self.data):
            raise ValueError(f"{self.data}: not there; visual='ood' takes another city's data from this sub-folder")
        self.routes = load_routes(self.data)[split] if data is not None else None
        if self.routes == []:
            file = os.path.join(self.data, "route_infos.json")
            raise ValueError(f"{file}: too few routes, none is in the {split} split")
        if self.routes and vl:
            check_street_views(self.data, tuple(self.routes))
        self.rng, self.stream, self.count, self.images = random.Random(f"virl/{seed}"), seed, 0, []

    @staticmethod
    def cells(rule, visual=None):
        """The table's columns for a model trained under `rule`, with pictures of the look `visual`: keywords of
        __init__. With pictures there is a fourth column: the trained rule, unseen routes, the other look."""
        other = {"id": "ood", "ood": "id"}
        columns = {column: dict(rule=r, split=split, move_on=True) for column, r, split in (
            ("seen", rule, "train"), ("id", rule, "unseen"), ("ood", other[rule], "unseen"))}
        if visual is not None:
            columns = {column: dict(keywords, vl=True, visual=visual) for column, keywords in columns.items()}
            columns["visual"] = dict(columns["id"], visual=other[visual])
        return columns

    def reset(self, seed=None):
        """Begin a route."""
        if seed is not None:
            self.rng, self.stream, self.count = random.Random(f"virl/{seed}"), seed, 0
        self.count += 1  # stream and count name the episode; a picture's random details hang on that and the position
        self.route = (self.rng.choice(self.routes) if self.routes else
                      city_route(self.rng.choice((CITIES if self.visual == "id" else ABROAD)[self.split]), self.rng))
        self.instructions, self.positions = walk(self.route, self.rng)
        self.failed = 0
        return self.arrive(0), self.images

    def arrive(self, at):
        """Stand at position number `at` -> the messages of its fresh conversation."""
        self.at, self.attempts, self.position = at, 0, self.positions[at]
        self.messages = [{"role": "user", "content": fill(PROMPT, self.instructions, self.positions, at, self.rule,
                                                          most=len(self.positions) if self.routes else HISTORY,
                                                          seen=SEEN if self.vl else None)}]
        if self.vl:
            self.images = [panorama_picture(self.data, self.route.name, self.position, self.pixels) if self.routes else
                           draw_picture(self.visual, self.route.name.split()[0], self.position.observation,
                                        f"{self.stream}/{self.count}/{at}", self.pixels)]
        return self.messages

    def step(self, text):
        """Judge an answer: on to the next position, feedback, or the end."""
        here, other = self.position, "ood" if self.rule == "id" else "id"
        came = self.positions[self.at - 1].action if self.at else None
        right = action_text(here, self.rule)
        verdict = judge_virl(text, right, says_intersection(here.observation))
        self.attempts += 1
        solved = verdict.kind == "correct"
        left = solved or self.attempts == self.verify
        self.failed += left and not solved
        done = left and (self.at == len(self.positions) - 1 or not (solved or self.move_on))
        info = {"verdict": verdict.kind, "success": done and not self.failed, "position_done": left,
                "position_solved": solved, "rule_matters": here.turn is not None,
                "other_rule": verdict.action == action_text(here, other) != right,
                "working": (last_json_object(text) or {}).get("current instruction") == here.instruction,
                "recognized": recognized(text, here.observation) if self.vl and came == "forward()" else None}
        if left and not done:
            self.arrive(self.at + 1)
        elif not left:
            self.messages = self.messages + [{"role": "assistant", "content": text},
                                             {"role": "user", "content": verdict.feedback}]
        return Step(None if done else self.messages, [] if done else self.images, verdict.reward, done, info)

    def expert(self):
        """The right answer here. There is only one."""
        return answer_text(self.position, action_text(self.position, self.rule))


if __name__ == "__main__":
    try:
        if sys.argv[-1].endswith(".png"):
            sys.exit(sample_sheet().save(sys.argv[-1], optimize=True))
        env = VIRL(rule="ood", data=sys.argv[1] if len(sys.argv) > 1 else None)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    messages, _ = env.reset(seed=0)
    while messages and not env.at == 4:
        messages = env.step(env.expert()).messages
    print(env.route.name, "\n\n" + env.messages[0]["content"], "\n\nexpert:", env.expert())
    print("\nwrong on purpose:", env.step(answer_text(env.position, "turn_direction(left)")))
