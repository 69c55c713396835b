"""env_gp.py: GeneralPoints. Make 24 from four cards, in words or in a picture (paper, section 4.1).

    python env_gp.py    # shows a hand, the prompt, the expert's answer and a failed attempt

Rules (the paper's Rule Variation): "id" counts J, Q, K as 10; "ood" as 11, 12, 13. The prompt states it.
Looks (the paper's Visual Variation), for vl=True: "id" has black suits, "ood" has red ones.
Fine-tuning sees TRAIN_HANDS hands; a fifth of all hands is kept for tests. Pretraining uses all hands.

An environment is one class. eval.py, sft.py and rl.py use only these parts of it:
    the constructor's keywords          rule, split ("train" for training), verify, seed, data; with pictures
        vl, visual, pixels; and what else columns() names
    reset(seed) -> (messages, images)   starts an episode, the same one for the same seed
    step(text) -> Step                  judges an answer. verifier.Step explains the keys of info
    expert(demonstrator) -> str         a right answer, always the same one in the same state. "expert":
        any one of the hand's solutions; "habit": the shortest one, as the base (the tiny pretrained model)
        would write it
  static methods:
    columns(rule, visual) -> dict       the table's columns: {column: keywords}. They are "seen", "id", "ood"
        and, with pictures, "visual"
    document(rng, chat_share)           pretraining text for the tiny model: a str or a chat
    picture_document(rng, chat_share, pixels=, rare=)    the same with pictures: (str or chat, images)
    fragments(vl) -> list of str        the fixed phrases of all texts, for the tokenizer
  attributes:
    title, rule_names, reward_scale, default_verify, verdicts, demonstrators; with pictures also visual_names
    fixed_routes                        only V-IRL has it: see VIRL
A third environment is one class and one line in eval.py's ENVS.
"""
import hashlib
import json
import random
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, combinations_with_replacement
from math import cos, pi, sin
from string import Template

from PIL import Image, ImageDraw, ImageFont

from verifier import GP_FEEDBACK, GP_REWARD, Step, judge_gp, last_json_object

RANKS = ["A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K"]
RULES = {"id": (10, 10, 10), "ood": (11, 12, 13)}  # the numbers of J, Q, K
SUITS = {"id": "SC", "ood": "HD"}                  # the looks: spades and clubs, or hearts and diamonds
TRAIN_HANDS = 300                                  # multisets in the training set, under either rule
OTHER = {"id": "ood", "ood": "id"}                 # the other rule, and the other look


def numbers_of(cards, faces):
    """["K", "2"], (11, 12, 13) -> [13, 2]. faces: the numbers of J, Q, K."""
    return [(*range(1, 11), *faces)[RANKS.index(rank)] for rank in cards]


# ------------------------------------------------------------------------------------------------------------
# The solver: every distinct solution of every hand, in exact arithmetic.

def combine(operator, a, b):
    """Join two expressions -> the one canonical expression of the result.
    An expression is (kind, plus, minus), the last two sorted tuples of str. Kind "+" adds `plus` and
    subtracts `minus`, kind "*" multiplies and divides; a number is ("", (text,), ()). Terms are flattened and
    sorted, so a+(b+c) and (c+b)+a count as one solution. An example, 9-(3-2) = 2+9-3:

        combine("-", ("", ("9",), ()), ("+", ("3",), ("2",)))  ->  ("+", ("2", "9"), ("3",))"""
    kind = "+" if operator in "+-" else "*"
    wrap = "({})" if kind == "*" else "{}"  # a sum in a product needs brackets
    a, b = (e if e[0] in ("", kind) else ("", (wrap.format(write(e)),), ()) for e in (a, b))
    plus, minus = (b[2], b[1]) if operator in "-/" else (b[1], b[2])
    return kind, tuple(sorted(a[1] + plus)), tuple(sorted(a[2] + minus))


def write(e):
    """("+", ("2", "9"), ("3",)) -> "2+9-3"."""
    kind, plus, minus = e
    return (kind or "+").join(plus) + "".join({"+": "-", "*": "/"}[kind] + m for m in minus)


def partitions(numbers, largest):
    """Every way to deal a sorted tuple into two parts, the left one of 1 to `largest` numbers."""
    lefts = {left for size in range(1, largest + 1) for left in combinations(numbers, size)}
    return [(left, tuple((Counter(numbers) - Counter(left)).elements())) for left in lefts]


@lru_cache(maxsize=None)
def reachable(numbers):
    """Sorted tuple of ints -> {value (Fraction): set of expressions} that use each number once."""
    if len(numbers) == 1:
        return {Fraction(numbers[0]): {("", (str(numbers[0]),), ())}}
    out = {}
    for left, right in partitions(numbers, len(numbers) - 1):
        for x, exprs_x in reachable(left).items():
            for y, exprs_y in reachable(right).items():
                results = {"+": x + y, "-": x - y, "*": x * y} | ({"/": x / y} if y else {})
                for op, value in results.items():
                    out.setdefault(value, set()).update(combine(op, a, b) for a in exprs_x for b in exprs_y)
    return out


@lru_cache(maxsize=None)
def solutions(numbers, target=24):
    """All distinct solutions of a hand, shortest first. numbers: sorted tuple of four ints -> tuple of str.
    target: an int, at least 1. The last join is not tried but looked up: x + y = 24 needs y = 24 - x.

        solutions((3, 3, 8, 8))  ->  ("8/(3-8/3)",)"""
    found = set()
    for left, right in partitions(numbers, 2):
        for x, exprs_x in reachable(left).items():
            # (operator, the y that it needs, True for y - x or y / x)
            joins = [("+", target - x, False), ("-", x - target, False), ("-", x + target, True)]
            if x:
                joins += [("*", target / x, False), ("/", x / target, False), ("/", target * x, True)]
            for operator, y, swap in joins:
                found.update(combine(operator, *((b, a) if swap else (a, b)))
                             for a in exprs_x for b in reachable(right).get(y, ()))
    return tuple(sorted(map(write, found), key=lambda s: (len(s), s)))


@lru_cache(maxsize=None)
def all_hands(highest=13, solvable=False):
    """All multisets of four numbers from 1 to `highest`, sorted: 1,820 for 13. solvable: only those."""
    hands = combinations_with_replacement(range(1, highest + 1), 4)
    return [hand for hand in hands if not solvable or solutions(hand)]


def is_unseen(numbers):
    """True for the fifth of all multisets kept out of fine-tuning. A stable hash: Python's own is salted."""
    return hashlib.sha256(",".join(map(str, sorted(numbers))).encode()).digest()[0] % 5 == 0


@lru_cache(maxsize=None)
def training_hands(rule):
    """The TRAIN_HANDS multisets that fine-tuning sees. Both rules have the same number of hands, so equal
    compute is an equal number of passes over them. Chosen by a stable hash, as in is_unseen()."""
    hands = [h for h in all_hands(max(RULES[rule]), solvable=True) if not is_unseen(h)]
    return frozenset(sorted(hands, key=lambda h: hashlib.sha256(str(h).encode()).digest())[:TRAIN_HANDS])


# ------------------------------------------------------------------------------------------------------------
# The words. Fixed wording between $slots is one token of the tiny model's tokenizer.

RULE = Template("A is 1; J is $j; Q is $q; K is $k")
# The example shows an answer's form. Its hand cannot make 24, so it is never dealt: a copy is never right.
EXAMPLE = '{"cards": ["3", "5", "8", "10"], "number": [3, 5, 8, 10], "formula": "(3+5)*(10-8)"}'
PROMPT = Template("Make $target from the four cards below, using the number of each card exactly once, with "
                  "+ - * / and brackets.\nRule: $rule.\nCards: $cards.\n"
                  "Answer in JSON only, in the form of this answer to other cards: " + EXAMPLE)
IN_PICTURE = "in the picture"  # the prompt's $cards where a picture shows them
GAME = Template("A game of cards. Rule: $rule.\nCards: $cards.\nNumbers: [$number], formula: $formula")
FACT = Template("Numbers: [$number], formula: $formula")


def answer_text(cards, numbers, formula):
    return json.dumps({"cards": cards, "number": numbers, "formula": formula})


def fill(template, cards=(), faces=(10, 10, 10), numbers=(), formula="", target=24):
    """A template's text: each $slot gets its part. cards: ranks, empty where a picture shows them."""
    return template.substitute(target=target, rule=RULE.substitute(dict(zip("jqk", faces))),
                               cards=", ".join(cards) if cards else IN_PICTURE,
                               number=str(list(numbers))[1:-1], formula=formula)


def fragments(vl=False):
    """The fixed phrases of all texts -> list of str. Each is one token of the tiny model."""
    texts = [t.template for t in (RULE, PROMPT, GAME, FACT)] + list(GP_FEEDBACK.values())
    out = [piece for text in texts for piece in re.split(r"\$\w+", text) if piece]
    out += [CAPTION.template.split(".")[0], IN_PICTURE] * vl  # a list or str times False is empty
    out += ['{"cards": ["', '", "', '"], "number": [']
    return out + [", ", '], "formula": "', '"}', "10", "11", "12", "13", "24"]


# ------------------------------------------------------------------------------------------------------------
# Synthetic pretraining text: arithmetic, games under many rules, mistakes, a little of the task.

def some_formula(numbers, rng, noise):
    """The shortest solution; with probability `noise` a random formula. So the base learns to
    write the shortest solution: that is its habit."""
    if rng.random() >= noise:
        return solutions(tuple(sorted(numbers)))[0]
    a, b, c, d = rng.sample(list(numbers), 4)
    p, q, r = rng.choices("+-*/", k=3)
    return rng.choice([f"({a}{p}{b}){q}({c}{r}{d})", f"({a}{p}{b}{q}{c}){r}{d}", f"({a}{p}{b}){q}{c}{r}{d}",
                       f"{a}{p}{b}{q}{c}{r}{d}", f"{a}{p}{b}{q}({c}{r}{d})"])


def game(rng):
    """A solvable deal under a random rule -> (faces, cards, numbers). In half of the rules J = Q = K."""
    numbers = []
    while not solutions(tuple(sorted(numbers))):
        faces = (rng.randint(1, 13),) * 3 if rng.random() < 0.5 else tuple(rng.randint(1, 13) for _ in "JQK")
        cards = rng.choices(RANKS, k=4)
        numbers = numbers_of(cards, faces)
    return faces, cards, numbers


def chat(faces, cards, numbers, rng, noise, misread=None):
    """A game in the task's own form -> messages: attempts until one is right or five have failed.
    noise: the share of wrong formulas. misread: the share of attempts that misread the picture, by read()
    below; None for cards in words."""
    messages = [{"role": "user", "content": fill(PROMPT, cards if misread is None else [], faces)}]
    for _ in range(5):
        ranks, read_as = (cards, numbers) if misread is None else read(faces, cards, numbers, rng, misread)
        text = answer_text(ranks, read_as, some_formula(read_as, rng, noise))
        verdict = judge_gp(text, numbers, cards=None if misread is None else cards)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": verdict.feedback}]
        if verdict.kind == "correct":
            break
    return messages[:-1]


def document(rng, chat_share=0.08, noise=0.1):
    """One pretraining document: a str, or with probability chat_share a list of chat messages.
    noise: the share of wrong formulas. Chats have three times as many, so that feedback occurs."""
    kind = rng.random()
    if kind < chat_share:
        return chat(*game(rng), rng, 3 * noise)
    if kind < (1 + chat_share) / 2:  # a bare fact about four numbers
        numbers = list(rng.choice(all_hands(solvable=True)))
        rng.shuffle(numbers)
        return fill(FACT, numbers=numbers, formula=some_formula(numbers, rng, noise))
    faces, cards, numbers = game(rng)
    return fill(GAME, cards, faces, numbers, some_formula(numbers, rng, noise))


# ------------------------------------------------------------------------------------------------------------
# The environment.

class GeneralPoints:
    """rule: "id" | "ood". split: "train" | "unseen" | "faces" (unseen hands with a J, Q or K, where the rules
    differ). verify: attempts per hand, at least 1. seed: fixes the expert's solutions, and the hands until
    reset(seed). vl: show the cards in a picture. visual: its look, "id" | "ood". pixels: its side, at least
    40. These three change no hand. Raises ValueError on any other value."""
    title = "GeneralPoints"  # for people
    rule_names = {"id": "J, Q, K = 10", "ood": "J, Q, K = 11, 12, 13"}
    visual_names = {"id": "black suits", "ood": "red suits"}
    reward_scale = 5.0   # PPO divides rewards by this: a solved hand is worth 1
    default_verify = 5   # attempts per hand, as in the paper
    verdicts = tuple(GP_REWARD)    # every kind a step can report
    demonstrators = ("expert", "habit")  # what expert() can be asked for
    document = staticmethod(document)
    fragments = staticmethod(fragments)

    def __init__(self, rule="id", split="train", verify=5, seed=0, data=None, vl=False, visual="id",
                 pixels=80):
        if data is not None:
            raise ValueError("GeneralPoints deals its own hands and reads no --data")
        if rule not in RULES or split not in ("train", "unseen", "faces") or verify < 1:
            raise ValueError(f"GeneralPoints: bad {rule=}, {split=} or {verify=}")
        if visual not in SUITS or pixels < 40:
            raise ValueError(f"GeneralPoints: bad {visual=} or {pixels=}")
        self.rule, self.split, self.verify, self.seed = rule, split, verify, seed
        self.vl, self.visual, self.pixels = vl, visual, pixels
        self.rng, self.stream, self.count = random.Random(f"gp/{seed}"), seed, 0

    @staticmethod
    def columns(rule, visual=None):
        """{column of the table: the constructor's keywords} for a model trained under `rule` and, with
        pictures, on `visual`."""
        columns = {"seen": dict(rule=rule, split="train"), "id": dict(rule=rule, split="unseen"),
                   "ood": dict(rule=OTHER[rule], split="faces")}
        if visual is not None:
            columns["visual"] = dict(columns["id"], visual=OTHER[visual])
        return columns

    def reset(self, seed=None):
        """Deal a hand: four ranks uniform over 13, again until it is in the split and can make 24."""
        if seed is not None:
            self.rng, self.stream, self.count = random.Random(f"gp/{seed}"), seed, 0
        self.count += 1  # stream and count name the episode; a picture's random details are drawn from them
        while True:
            self.cards = self.rng.choices(RANKS, k=4)
            self.numbers = numbers_of(self.cards, RULES[self.rule])
            key = tuple(sorted(self.numbers))
            if self.split == "train":
                in_split = key in training_hands(self.rule)
            else:
                in_split = is_unseen(key) and solutions(key)
            if in_split and (self.split != "faces" or set(self.cards) & set("JQK")):
                break
        self.attempts, self.images = 0, []
        if self.vl:  # the picture has a generator of its own: the deals go on as they do without pictures
            self.images = [picture(self.cards, self.visual, self.pixels, f"{self.stream}/{self.count}")]
        content = fill(PROMPT, [] if self.vl else self.cards, RULES[self.rule])
        self.messages = [{"role": "user", "content": content}]
        return self.messages, self.images

    def step(self, text):
        """Judge an attempt. A failed one is answered with feedback until `verify` attempts are used up."""
        verdict = judge_gp(text, self.numbers, cards=self.cards if self.vl else None)
        self.attempts += 1
        solved = verdict.kind == "correct"
        done = solved or self.attempts == self.verify
        other = sorted(numbers_of(self.cards, RULES[OTHER[self.rule]]))
        differs = other != sorted(self.numbers)
        info = {"verdict": verdict.kind, "success": solved, "position_done": done, "position_solved": solved,
                "rule_matters": differs, "other_rule": differs and sorted(verdict.numbers or []) == other,
                "recognized": recognized(text, self.cards) if self.vl else None}
        self.messages = self.messages + [{"role": "assistant", "content": text},
                                         {"role": "user", "content": verdict.feedback}]
        return Step(None if done else self.messages, [] if done else self.images, verdict.reward, done, info)

    def expert(self, demonstrator="expert"):
        """A right answer as JSON, the same for a hand's numbers and a seed. demonstrator: see the module."""
        options = solutions(tuple(sorted(self.numbers)))
        chosen = random.Random(f"expert/{self.seed}/{sorted(self.numbers)}").choice(options)
        return answer_text(self.cards, self.numbers, options[0] if demonstrator == "habit" else chosen)


# ------------------------------------------------------------------------------------------------------------
# Pictures: four cards on a green table, two by two in reading order. The task in words ends above.

CAPTION = Template("A picture of cards.\nCards: $cards")  # the list as in GAME: reading carries over
INK = {"S": (25, 25, 25), "C": (25, 25, 25), "H": (205, 25, 25), "D": (205, 25, 25)}  # same green and blue
CIRCLE = [2 * pi * i / 60 for i in range(60)]  # angles; all shapes are polygons in a unit square, y down
HEART = [(0.5 + 0.5 * sin(t) ** 3, 0.42 - (13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 29.5)
         for t in CIRCLE]
DISCS = [[(x + r * cos(t), y + r * sin(t)) for t in CIRCLE]
         for x, y, r in ((0.5, 0.25, 0.25), (0.24, 0.6, 0.24), (0.76, 0.6, 0.24))]
STEM = [(0.44, 0.4), (0.56, 0.4), (0.72, 1.0), (0.28, 1.0)]
SHAPES = {"H": [HEART], "D": [[(0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)]],
          "S": [[(x, 0.85 * (1 - y)) for x, y in HEART], STEM], "C": [*DISCS, STEM]}


@lru_cache(maxsize=64)  # all 52 cards of one size: 0.2 MB for pictures of 80 pixels, 40 MB for 1200
def draw_card(rank, suit, pixels):
    """One card for a picture of `pixels` -> PIL image, RGB, 28 x 36 for 80. Drawn large, then shrunk."""
    size = (round(0.35 * pixels), round(0.45 * pixels))
    unit = 4 * pixels / 80  # one pixel of the small picture
    card = Image.new("RGB", (4 * size[0], 4 * size[1]), (70, 70, 70))  # its edge
    draw, middle = ImageDraw.Draw(card), card.width / 2
    draw.rectangle((unit, unit, card.width - 1 - unit, card.height - 1 - unit), fill=(245, 245, 245))
    font = ImageFont.load_default((19 if rank == "10" else 22) * unit)  # "10" in the same width
    draw.text((middle, 18.25 * unit), rank, INK[suit], font, anchor="ms", stroke_width=round(unit / 2))
    for shape in SHAPES[suit]:
        draw.polygon([(middle + (x - 0.5) * 13 * unit, (20.5 + 13 * y) * unit) for x, y in shape], INK[suit])
    return card.resize(size, Image.Resampling.HAMMING)  # sharp, without fringes


def picture(cards, visual, pixels, seed):
    """Four ranks -> PIL image, RGB, pixels x pixels, a function of the arguments. The seed draws each card's
    suit and shift (at most 1/40 of the side), the brightness and the grain, the same for every look and size.
    So the black and the red picture of a seed differ only in the ink and the suits' shapes."""
    rng = random.Random(f"picture/{seed}")
    table = Image.new("RGB", (pixels, pixels), (25, 110, 65))  # green
    for i, rank in enumerate(cards):
        card = draw_card(rank, rng.choice(SUITS[visual]), pixels)
        x, y = ((pixels / 2 - side) / 2 + pixels / 40 * rng.uniform(-1, 1) for side in card.size)
        table.paste(card, (round(pixels / 2 * (i % 2) + x), round(pixels / 2 * (i // 2) + y)))
    light = rng.uniform(0.85, 1.05)
    grain = Image.frombytes("RGB", (80, 80), rng.randbytes(80 * 80 * 3)).resize((pixels, pixels))
    return Image.blend(table.point(lambda level: light * level), grain, 0.06)


def recognized(answer, cards):
    """The share of the cards that an answer names, in any order: float in [0, 1]. Never raises. A longer list
    is divided by its own length, so naming everything gains nothing.
        recognized('{"cards": ["J", "J", 3, "K"]}', ["3", "J", "10", "K"])  ->  0.75"""
    said = (last_json_object(answer) or {}).get("cards")
    said = list(map(str, said)) if isinstance(said, list) else []  # 3 counts as "3", as it does for judge_gp
    return (Counter(said) & Counter(cards)).total() / max(len(said), len(cards))


def read(faces, cards, numbers, rng, misread):
    """What somebody reads in a picture -> (cards, numbers). misread: how often one or two ranks are wrong."""
    if rng.random() >= misread:
        return cards, numbers
    said_numbers = []
    while not solutions(tuple(sorted(said_numbers))):
        said = list(cards)
        for i in rng.sample(range(4), rng.randint(1, 2)):
            said[i] = rng.choice([rank for rank in RANKS if rank != cards[i]])
        said_numbers = numbers_of(said, faces)
    return said, said_numbers


def picture_document(rng, chat_share=0.08, noise=0.1, pixels=80, rare="ood"):
    """One pretraining document with a picture -> (document, [picture]). It is a caption or a game, a str in
    which "<image>" marks the picture; with probability chat_share it is a chat about the picture.
    noise: the share of wrong formulas. In chats it is 3 noise, and noise / 2 of the attempts are misread.
    rare: the held-out look. The base must know it poorly, or nothing would be left to generalise to. So only
    a tenth of the pictures have this look, and half of those are misread.
    In half of the captions all four cards are alike: there the model learns what a rank looks like, before it
    has to know which card is which. Without them the base of red cards (seed 0) did not learn to read."""
    look = rare if rng.random() < 0.1 else OTHER[rare]
    faces, cards, numbers = game(rng)
    kind = rng.random()
    caption = chat_share <= kind < (1 + chat_share) / 2
    if caption and rng.random() < 0.5:
        cards = [rng.choice(cards)] * 4
    shown = [picture(cards, look, pixels, rng.getrandbits(64))]
    if kind < chat_share:
        return chat(faces, cards, numbers, rng, 3 * noise, 0.5 if look == rare else noise / 2), shown
    said, numbers = read(faces, cards, numbers, rng, 0.5 if look == rare else 0)
    if caption:
        return "<image>" + fill(CAPTION, said), shown
    return "<image>" + fill(GAME, said, faces, numbers, some_formula(numbers, rng, noise)), shown


GeneralPoints.picture_document = staticmethod(picture_document)  # here, so that the class stands above


if __name__ == "__main__":
    env = GeneralPoints(rule="ood")
    print(env.reset(seed=0)[0][0]["content"], "\n\nexpert:", env.expert())
    print("\nwrong on purpose:", env.step(answer_text(env.cards, env.numbers, "1+1")))
    print("\nhands solvable with 1..13:", len(all_hands(solvable=True)), "of", len(all_hands()))
