"""env_virl.py: V-IRL in words. Follow a route through a city by its instructions (paper, section 4.2).

    python env_virl.py            # shows a route, a prompt, the expert's answer and a failed attempt
    python env_virl.py FOLDER     # the same on the released data set in FOLDER (route_infos.json)

The interface is env_gp.py's: reset, step, expert, cells, document, fragments. An episode is a route, a route is a row
of positions, and each position is a conversation of its own:
    a wrong answer           is followed by feedback in the same conversation, `verify` attempts at most
    the right one            leads to the next position, a fresh conversation (only the right action moves)
    attempts used up         end the episode in training; with move_on=True, which the table's columns set, the position
                             counts as failed and the walk goes on along the right path, so that per-step accuracy
                             covers whole routes
In step()'s info "rule_matters" marks the turns: forward() and stop() are the same under both rules.

Rules (the paper's Rule Variation): "id" turns by absolute words (north, northeast, ...), "ood" by relative ones (left,
slightly left, ...). The action space is written in the prompt, and the instructions hold both words: "Turn left to
face west." So the held-out rule is a matter of which word to copy.

Routes come from one of two sources.
    a procedural city   jittered blocks and diagonals, 2-5 legs. Training and unseen routes lie in different cities with
                        other streets and other landmarks (the base has met the landmarks' names, but neither city).
    data=FOLDER         the authors' released routes (load_routes), a fifth of them unseen by a stable hash.

Departures from the authors' release
  - Headings wrap around (verifier.relative_word), seeds count, and turning on the spot is seen: behind a turn the
    observation is only "at an intersection", no longer the landmark.
  - Prompts in the city show the last HISTORY observations and actions, not all: 81 tokens of the tiny tokenizer on
    average in place of 94, and the last turn is always among them. With data=FOLDER all are shown.
  - Steps are longer in the city: at most one between two intersections, so that turns are 37% of all positions.
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

from verifier import (COMPASS, RELATIVE, VIRL_FEEDBACK, VIRL_REWARD, Step, compass_word, judge_virl, relative_word,
                      says_intersection)

RULES = {"id": COMPASS, "ood": RELATIVE}  # the words x of turn_direction(x)
HISTORY = 3                               # observations and actions shown in the city
CITIES = {"train": ("Aldham", "Brookport"), "unseen": ("Corvale", "Dunmore"), "base": ("Eastwick", "Fenton", "Garrow")}
LANDMARKS = [f"{first} {kind}" for kind in ("Bank", "Cafe", "Hotel", "Park", "Shop", "Inn")
             for first in ("Oak", "Star", "Moon", "Iron", "Gold", "Rose", "Lake", "Bell", "Sun", "Fox")]


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
    disjoint halves of LANDMARKS; the base's cities draw from all."""
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
    names = LANDMARKS[0::2] if name in CITIES["train"] else LANDMARKS[1::2] if name in CITIES["unseen"] else LANDMARKS
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
        facing, legs = rng.randrange(360), rng.randint(2, 5)
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
WALK = Template("A walk. " + ACTIONS + "Steps: $history")
GLIMPSE = Template("On a walk. " + ACTIONS + "Last steps: $history\nNow: $observation\n$answer")
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


def fill(template, instructions, positions, at, space, most=HISTORY, **more):
    """A template at position number `at`, with at most `most` steps before it, always the right ones."""
    past = positions[max(0, at - most):at]
    return template.substitute(
        words=", ".join(SPACES[space]), instructions="\n".join(instructions), observation=positions[at].observation,
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


def document(rng, chat_share=0.08, noise=0.1):
    """One pretraining document: a str (half whole walks, half single positions), or with probability chat_share a list
    of chat messages about one position under one of the two rules.

    noise: the share of wrong words in the turns taken (three times that in chats, so that there is feedback to learn
    from). Instructions and observations are never wrong: a model must be able to trust what it copies."""
    kind = rng.random()
    chat = kind < chat_share
    words = [("ood", "id")[i] if chat or rng.random() < 0.7 else ("clock", "letters")[i] for i in (0, 1)]
    instructions, positions = walk(city_route(rng.choice(CITIES["base"]), rng), rng, *words)
    space = rng.choice(words)
    if not chat and kind < (1 + chat_share) / 2:
        said = [said_action(p, space, rng, noise) for p in positions]
        return WALK.substitute(words=", ".join(SPACES[space]), instructions="\n".join(instructions),
                               history=history_text(positions, said))
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


def fragments():
    """The fixed phrases and words of all texts above, for training a tokenizer in which each is a token or a few."""
    texts = [t.template for t in (LANDMARK, FIRST, TURN, MOVE, ARRIVE, PROMPT, WALK, GLIMPSE)] + [MOVE_ON, ANSWER]
    out = [piece for text in texts for piece in re.split(r"\$\w+", text) if piece]
    out += list(VIRL_FEEDBACK.values())
    often = [NOTHING, CROSSING, "forward()", "stop()", "turn_direction(", "; ", "); ", ", ", ": ", ".\n", "none",
             "Last steps: ", "Steps: ", "\nNow: "]
    words = [*COMPASS, *RELATIVE, *LANDMARKS, *SPACES["letters"], *SPACES["clock"]]
    return out + 20 * often + 50 * words  # what is frequent is merged first, so it stays one token wherever it stands


# ----------------------------------------------------------------------------------------------------------------------
# The environment.

class VIRL:
    """rule: "id" | "ood". split: "train" | "unseen". verify: attempts per position, at least 1. seed: fixes the routes
    of reset(). data: folder of the released data set, None for the procedural city. move_on: go on after a position
    whose attempts are used up. Raises ValueError on a value outside these and on damaged data."""
    title = "V-IRL"
    rule_names = {"id": "absolute directions", "ood": "relative directions"}
    reward_scale = 1.0   # PPO divides rewards by this: a right step is worth 1
    default_verify = 2   # attempts per position, as in the paper
    batch = 16           # routes a step of SFT and PPO, by default: some 150 positions
    row_tokens = 256     # width of a pretraining row
    verdicts = tuple(VIRL_REWARD)
    document = staticmethod(document)
    fragments = staticmethod(fragments)

    def __init__(self, rule="id", split="train", verify=2, seed=0, data=None, move_on=False):
        if rule not in RULES or split not in ("train", "unseen") or verify < 1:
            raise ValueError(f"V-IRL: bad rule={rule!r}, split={split!r} or verify={verify!r}")
        self.rule, self.split, self.verify, self.seed, self.move_on = rule, split, verify, seed, move_on
        self.routes = load_routes(data)[split] if data is not None else None
        if self.routes == []:
            raise ValueError(f"{os.path.join(data, 'route_infos.json')}: too few routes, none is in the {split} split")
        self.rng = random.Random(f"virl/{seed}")

    @staticmethod
    def cells(rule):
        """The table's columns for a model trained under `rule`: keywords of __init__."""
        other = "ood" if rule == "id" else "id"
        return {column: dict(rule=r, split=split, move_on=True) for column, r, split in (
            ("seen", rule, "train"), ("id", rule, "unseen"), ("ood", other, "unseen"))}

    def reset(self, seed=None):
        """Begin a route."""
        if seed is not None:
            self.rng = random.Random(f"virl/{seed}")
        self.route = (self.rng.choice(self.routes) if self.routes else
                      city_route(self.rng.choice(CITIES[self.split]), self.rng))
        self.instructions, self.positions = walk(self.route, self.rng)
        self.failed = 0
        return self.arrive(0), []

    def arrive(self, at):
        """Stand at position number `at` -> the messages of its fresh conversation."""
        self.at, self.attempts, self.position = at, 0, self.positions[at]
        self.messages = [{"role": "user", "content": fill(PROMPT, self.instructions, self.positions, at, self.rule,
                                                          most=len(self.positions) if self.routes else HISTORY)}]
        return self.messages

    def step(self, text):
        """Judge an answer: on to the next position, feedback, or the end."""
        here, other = self.position, "ood" if self.rule == "id" else "id"
        right = action_text(here, self.rule)
        verdict = judge_virl(text, right, says_intersection(here.observation))
        self.attempts += 1
        solved = verdict.kind == "correct"
        left = solved or self.attempts == self.verify
        self.failed += left and not solved
        done = left and (self.at == len(self.positions) - 1 or not (solved or self.move_on))
        info = {"verdict": verdict.kind, "success": done and not self.failed, "position_done": left,
                "position_solved": solved, "rule_matters": here.turn is not None,
                "other_rule": verdict.action == action_text(here, other) != right}
        if left and not done:
            self.arrive(self.at + 1)
        elif not left:
            self.messages = self.messages + [{"role": "assistant", "content": text},
                                             {"role": "user", "content": verdict.feedback}]
        return Step(None if done else self.messages, [], verdict.reward, done, info)

    def expert(self):
        """The right answer here. There is only one."""
        return answer_text(self.position, action_text(self.position, self.rule))


if __name__ == "__main__":
    env = VIRL(rule="ood", data=sys.argv[1] if len(sys.argv) > 1 else None)
    messages, _ = env.reset(seed=0)
    while messages and not env.at == 4:
        messages = env.step(env.expert()).messages
    print(env.route.name, "\n\n" + env.messages[0]["content"], "\n\nexpert:", env.expert())
    print("\nwrong on purpose:", env.step(answer_text(env.position, "turn_direction(left)")))
