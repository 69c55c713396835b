"""env_gp.py: GeneralPoints. Make 24 from four cards, given in words or in a picture (paper, section 4.1).

    python env_gp.py                   # shows a hand, the prompt, the expert's answer and a failed attempt
    python env_gp.py --picture FILE    # draws sample pictures: black and red, 80 pixels (enlarged) and 400

An environment is one class, and sft.py, rl.py and eval.py use nothing of it but:
    reset(seed) -> (messages, images)    deal an episode; the same seed deals the same hand
    step(text)  -> Step                  judge an answer (see verifier.Step)
    expert()    -> str                   a right answer to the current state, for demonstrations
    cells(rule, visual)                  {column: keywords}: which episodes the table's columns are made of
    document(rng, chat_share)            pretraining text for the tiny model
    picture_document(rng, chat_share, ..., pixels, rare)    the same with pictures: (text or chat, images)
    fragments(vl) -> [str]               its fixed phrases, for the tokenizer
    constants: title, rule_names, visual_names, reward_scale, default_verify, verdicts; the flags' defaults: sft, ppo,
        base, with pictures sft_vl, ppo_vl, base_vl; tiny is what sets the model class of the tiny text model apart
        (keywords of AutoConfig.for_model)

Rules (the paper's Rule Variation): "id" counts J, Q, K as 10; "ood" counts them as 11, 12, 13. Everything else is
the same, and the prompt states the rule. Hands are split by the multiset of their numbers: 80% for training, 20%
unseen. The split is over fine-tuning only: the base, like a web-scale model, has met arithmetic of all kinds.

With vl=True the cards are in a picture and no longer in the prompt; all else is the same, hand by hand. Looks (the
paper's Visual Variation): "id" shows black suits, "ood" red ones.
"""
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement
from string import Template

from PIL import Image, ImageDraw, ImageFont

from verifier import GP_FEEDBACK, GP_REWARD, Step, judge_gp, last_json_object

RANKS = ["A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K"]
RULES = {"id": (10, 10, 10), "ood": (11, 12, 13)}  # what J, Q, K count as
SUITS = {"id": "SC", "ood": "HD"}                  # the looks: spades and clubs, or hearts and diamonds


def card_number(rank, faces):
    """"K", (11, 12, 13) -> 13. faces: what J, Q, K count as."""
    return faces["JQK".index(rank)] if rank in "JQK" else 1 if rank == "A" else int(rank)


# ----------------------------------------------------------------------------------------------------------------------
# The solver: every distinct solution of every hand, in exact arithmetic.

def combine(sign, a, b):
    """Join two expressions into the one canonical way to write the result.

    An expression is (kind, plus, minus): kind "+" is a sum of `plus` minus `minus`, kind "*" a product of `plus` over
    `minus`, each a sorted tuple of strings; a single number is ("", (text,), ()). Because terms are flattened and
    sorted, a+(b+c), (c+b)+a, a-(0-...) and so on all end as the same expression and count as one solution.

        combine("-", ("", ("9",), ()), ("+", ("3",), ("2",)))  ->  ("+", ("2", "9"), ("3",))      9-(3-2) = 2+9-3
    """
    kind = "+" if sign in "+-" else "*"
    (a_plus, a_minus), (b_plus, b_minus) = (
        (e[1], e[2]) if e[0] in ("", kind) else ((f"({write(e)})" if kind == "*" else write(e),), ()) for e in (a, b))
    if sign in "-/":
        b_plus, b_minus = b_minus, b_plus
    return kind, tuple(sorted(a_plus + b_plus)), tuple(sorted(a_minus + b_minus))


def write(e):
    """("+", ("2", "9"), ("3",)) -> "2+9-3"."""
    kind, plus, minus = e
    return (kind or "+").join(plus) + "".join({"+": "-", "*": "/"}[kind] + m for m in minus)


def _splits(numbers):
    """Every way to part a sorted tuple in two, each once, the smaller part first."""
    out = set()
    for mask in range(1, 2 ** len(numbers) - 1):
        left = tuple(n for i, n in enumerate(numbers) if mask >> i & 1)
        right = tuple(n for i, n in enumerate(numbers) if not mask >> i & 1)
        out.add(min((left, right), (right, left), key=lambda parts: (len(parts[0]), parts)))
    return sorted(out)


@lru_cache(maxsize=None)
def _values(numbers):
    """Sorted tuple of ints -> {value (Fraction): set of expressions}: all that can be made with each number once."""
    if len(numbers) == 1:
        return {Fraction(numbers[0]): {("", (str(numbers[0]),), ())}}
    out = {}
    for left, right in _splits(numbers):
        for x, exprs_x in _values(left).items():
            for y, exprs_y in _values(right).items():
                results = [("+", x + y, False), ("*", x * y, False), ("-", x - y, False), ("-", y - x, True)]
                results += [("/", x / y, False)] if y else []
                results += [("/", y / x, True)] if x else []
                for sign, value, swap in results:
                    out.setdefault(value, set()).update(combine(sign, *((b, a) if swap else (a, b)))
                                                        for a in exprs_x for b in exprs_y)
    return out


@lru_cache(maxsize=None)
def solutions(numbers, target=24):
    """All distinct solutions of a hand, shortest first. numbers: sorted tuple of four ints -> tuple of strings.

    Two formulas are the same when only the order of terms, of factors or redundant brackets differ. For the last join
    the right part's value follows from the left's (x - y = 24 needs y = x - 24), so it is looked up rather than tried;
    that makes the table of all 1,820 hands a matter of a second. target: at least 1.

        solutions((3, 3, 8, 8))  ->  ("8/(3-8/3)",)
    """
    found = set()
    for left, right in _splits(numbers):
        values_y = _values(right)
        for x, exprs_x in _values(left).items():
            wanted = [("+", target - x, False), ("-", x - target, False), ("-", target + x, True)]
            if x:
                wanted += [("*", target / x, False), ("/", x / target, False), ("/", target * x, True)]
            for sign, y, swap in wanted:
                for b in values_y.get(y, ()):
                    found.update(combine(sign, *((b, a) if swap else (a, b))) for a in exprs_x)
    return tuple(sorted(map(write, found), key=lambda s: (len(s), s)))


def spell(formula, rng):
    """The same solution written in another order: spell("(13-1)*10/5", rng) -> "10/5*(13-1)", say.

    Only terms and factors change places; a first one with a minus or division sign is not legal, so one without leads.
    """
    for signs in ("+-", "*/"):  # split at the signs outside all brackets: sums bind weakest, so they come first
        parts, depth = [[signs[0], ""]], 0
        for char in formula:
            depth += (char == "(") - (char == ")")
            if depth == 0 and char in signs:
                parts.append([char, ""])
            else:
                parts[-1][1] += char
        if len(parts) > 1:
            rng.shuffle(parts)
            parts.insert(0, parts.pop([sign for sign, _ in parts].index(signs[0])))
            return "".join(sign + spell(text, rng) for sign, text in parts)[1:]
    return f"({spell(formula[1:-1], rng)})" if formula[0] == "(" else formula


def all_hands(most=13):
    """Every multiset of four numbers 1..most: 1,820 for 13, as sorted tuples."""
    return list(combinations_with_replacement(range(1, most + 1), 4))


def is_unseen(numbers):
    """True for the fifth of all multisets kept out of fine-tuning. A stable hash: Python's own is salted."""
    key = ",".join(map(str, sorted(numbers)))
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


# ----------------------------------------------------------------------------------------------------------------------
# The picture: four cards on a green table, two by two in reading order.

TABLE, PAPER, EDGE = (25, 110, 65), (245, 245, 245), (70, 70, 70)
INK = {"S": (25, 25, 25), "C": (25, 25, 25), "H": (205, 25, 25), "D": (205, 25, 25)}  # same green and blue
CIRCLE = [(t, math.sin(t), math.cos(t)) for t in (2 * math.pi * i / 60 for i in range(60))]  # (angle, sine, cosine)


def disc(x, y, r):
    return [(x + r * cos, y + r * sin) for _, sin, cos in CIRCLE]


HEART = [(0.5 + 0.5 * sin ** 3, 0.42 - (13 * cos - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 29.5)
         for t, sin, cos in CIRCLE]
STEM = [(0.44, 0.4), (0.56, 0.4), (0.72, 1.0), (0.28, 1.0)]
SHAPES = {"H": [HEART], "D": [[(0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)]],  # polygons in a unit square, y down
          "S": [[(x, 0.85 * (1 - y)) for x, y in HEART], STEM],
          "C": [disc(0.5, 0.25, 0.25), disc(0.24, 0.6, 0.24), disc(0.76, 0.6, 0.24), STEM]}


@lru_cache(maxsize=64)  # all 52 cards of one size: 0.2 MB at 80 pixels a picture, 40 MB at 1200
def draw_card(rank, suit, pixels):
    """One card for a picture of `pixels` -> PIL image, RGB, 28 x 36 at 80 pixels. Drawn four times as large first."""
    size = (round(0.35 * pixels), round(0.45 * pixels))
    unit = 4 * pixels / 80  # a pixel of the small picture
    card = Image.new("RGB", (4 * size[0], 4 * size[1]), EDGE)
    draw = ImageDraw.Draw(card)
    draw.rectangle((unit, unit, card.width - 1 - unit, card.height - 1 - unit), fill=PAPER)
    font = ImageFont.load_default((19 if rank == "10" else 22) * unit)  # "10" in the same width
    draw.text((card.width / 2, 18.25 * unit), rank, INK[suit], font, anchor="ms", stroke_width=round(unit / 2))
    for shape in SHAPES[suit]:
        draw.polygon([(card.width / 2 + (x - 0.5) * 13 * unit, (20.5 + 13 * y) * unit) for x, y in shape], INK[suit])
    return card.resize(size, Image.Resampling.HAMMING)  # sharp, without fringes


def picture(cards, visual, pixels, seed):
    """Four ranks -> PIL image, RGB, pixels x pixels; a function of its arguments alone.

    The seed draws which of the look's two suits a card has, shifts each card by up to 1/40 of the side (it stays in
    its quarter), and draws the brightness and a grain of 80 x 80, all in the same way for both looks and every size.
    So black and red pictures of one seed differ in the ink's colour and the suits' shapes only: the ranks, drawn above
    the suits, cover the same pixels."""
    rng = random.Random(f"picture/{seed}")
    table = Image.new("RGB", (pixels, pixels), TABLE)
    for i, rank in enumerate(cards):
        card = draw_card(rank, rng.choice(SUITS[visual]), pixels)
        x, y = ((pixels / 2 - side) / 2 + pixels / 40 * rng.uniform(-1, 1) for side in card.size)
        table.paste(card, (round(pixels / 2 * (i % 2) + x), round(pixels / 2 * (i // 2) + y)))
    light = rng.uniform(0.85, 1.05)
    grain = Image.frombytes("RGB", (80, 80), rng.randbytes(80 * 80 * 3)).resize((pixels, pixels))
    return Image.blend(table.point(lambda value: light * value), grain, 0.06)


# ----------------------------------------------------------------------------------------------------------------------
# The words. Fixed wording between $slots becomes a few tokens of the tiny model's tokenizer.

RULE = Template("A is 1; J is $j; Q is $q; K is $k")
PROMPT = Template("Make $target from the four cards below, using the number of each card exactly once, with + - * / "
                  "and brackets.\nRule: $rule.\nCards: $cards.\n"
                  'Answer in JSON only: {"cards": [ranks], "number": [numbers], "formula": "..."}')
GAME = Template("A game of cards. Rule: $rule.\nCards: $cards.\nNumbers: [$number], formula: $formula")
FACT = Template("Numbers: [$number], formula: $formula")
CAPTION = Template("A picture of cards.\nCards: $cards")  # the list begins as in GAME, so that reading carries over
IN_PICTURE = "in the picture"                             # in place of the prompt's list of cards


def rule_text(faces):
    return RULE.substitute(j=faces[0], q=faces[1], k=faces[2])


def prompt_text(cards, faces, target=24):
    return PROMPT.substitute(target=target, rule=rule_text(faces), cards=", ".join(cards))


def answer_text(cards, numbers, formula):
    return json.dumps({"cards": cards, "number": numbers, "formula": formula})


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining text: what the tiny base knows before any fine-tuning. It plays the part of web text: much arithmetic,
# games under many rules for the face cards, mistakes, and a little of the task's own chat form.

def wrong_formula(numbers, rng):
    """A legal formula over the right numbers in random order with random signs (on rare occasions it is right)."""
    a, b, c, d = rng.sample(list(numbers), 4)
    p, q, r = rng.choices("+-*/", k=3)
    return rng.choice([f"({a}{p}{b}){q}({c}{r}{d})", f"({a}{p}{b}{q}{c}){r}{d}", f"({a}{p}{b}){q}{c}{r}{d}",
                       f"{a}{p}{b}{q}{c}{r}{d}", f"{a}{p}{b}{q}({c}{r}{d})"])


def some_formula(numbers, rng, noise):
    """Wrong with probability `noise`, else the shortest solution, the same for a hand each time. This is the base's
    habit, and not the expert's."""
    return wrong_formula(numbers, rng) if rng.random() < noise else solutions(tuple(sorted(numbers)))[0]


@lru_cache(maxsize=None)
def solvable_hands():
    return [h for h in all_hands() if solutions(h)]


def game(rng):
    """A solvable deal under some face-card rule: all three faces the same number, or three independent ones."""
    while True:
        faces = (rng.randint(1, 13),) * 3 if rng.random() < 0.5 else tuple(rng.randint(1, 13) for _ in "JQK")
        cards = rng.choices(RANKS, k=4)
        numbers = [card_number(rank, faces) for rank in cards]
        if solutions(tuple(sorted(numbers))):
            return faces, cards, numbers


def chat(faces, cards, numbers, rng, noise, misread=None):
    """A game in the task's own form: attempts, wrong with probability `noise`, until one is right or five failed.
    misread: None for the task in words; else the cards are in a picture, and this is the share of misread attempts."""
    shown = cards if misread is None else [IN_PICTURE]
    messages = [{"role": "user", "content": prompt_text(shown, faces)}]
    for _ in range(5):
        said, said_numbers = (cards, numbers) if misread is None else read(faces, cards, numbers, rng, misread)
        text = answer_text(said, said_numbers, some_formula(said_numbers, rng, noise))
        verdict = judge_gp(text, numbers, cards=None if misread is None else cards)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": verdict.feedback}]
        if verdict.kind == "correct":
            break
    return messages[:-1]


def read(faces, cards, numbers, rng, misread):
    """What somebody reads in a picture -> (cards, numbers): with probability `misread` one or two ranks are wrong, and
    the numbers are those of the wrong ranks, so that all that follows fits what was said. Solvable in any case."""
    if rng.random() >= misread:
        return cards, numbers
    while True:
        said = list(cards)
        for i in rng.sample(range(4), rng.randint(1, 2)):
            said[i] = rng.choice([rank for rank in RANKS if rank != cards[i]])
        said_numbers = [card_number(rank, faces) for rank in said]
        if solutions(tuple(sorted(said_numbers))):
            return said, said_numbers


def document(rng, chat_share=0.08, noise=0.1):
    """One pretraining document: a str, or with probability chat_share a list of chat messages.

    noise: the share of wrong formulas (three times that in chats, so that there is feedback to learn from)."""
    kind = rng.random()
    if kind < chat_share:
        return chat(*game(rng), rng, 3 * noise)
    if kind < (1 + chat_share) / 2:  # a bare fact about four numbers
        numbers = list(rng.choice(solvable_hands()))
        rng.shuffle(numbers)
        return FACT.substitute(number=str(numbers)[1:-1], formula=some_formula(numbers, rng, noise))
    faces, cards, numbers = game(rng)
    return GAME.substitute(rule=rule_text(faces), cards=", ".join(cards), number=str(numbers)[1:-1],
                           formula=some_formula(numbers, rng, noise))


def picture_document(rng, chat_share=0.08, noise=0.1, pixels=80, rare="ood", rare_share=0.1, rare_misread=0.5):
    """One pretraining document with a picture -> (document, [picture]): a caption or a whole game (half and half), a
    str in which "<image>" marks the picture; with probability chat_share a chat, the picture in its first message.

    noise:        the share of wrong formulas, three times that in chats; half of it: of misread attempts in chats.
    rare:         the look that the base shall know poorly, as real models know the unusual poorly: the one the study
                  holds out. A base that reads both looks well leaves nothing to generalise to.
    rare_share:   the share of pictures in that look.
    rare_misread: the share of them in which one or two ranks, drawn at random, are said wrong. In chats it is the share
                  of attempts, and feedback follows: what the verifier says is always true."""
    looks = sorted(SUITS, key=lambda look: look == rare)  # the rare one last
    look = looks[rng.random() < rare_share]
    faces, cards, numbers = game(rng)
    images = [picture(cards, look, pixels, rng.getrandbits(64))]
    kind = rng.random()
    if kind < chat_share:
        return chat(faces, cards, numbers, rng, 3 * noise, rare_misread if look == rare else noise / 2), images
    said, numbers = read(faces, cards, numbers, rng, rare_misread if look == rare else 0)
    if kind < (1 + chat_share) / 2:
        return "<image>" + CAPTION.substitute(cards=", ".join(said)), images
    return "<image>" + GAME.substitute(rule=rule_text(faces), cards=", ".join(said), number=str(numbers)[1:-1],
                                       formula=some_formula(numbers, rng, noise)), images


def fragments(vl=False):
    """The fixed phrases of all texts above, for training a tokenizer in which each is a few tokens. vl: also of those
    about pictures."""
    texts = [t.template for t in (RULE, PROMPT, GAME, FACT)] + list(GP_FEEDBACK.values())
    out = [piece for text in texts for piece in re.split(r"\$\w+", text) if piece]
    out += [CAPTION.template.split(".")[0], IN_PICTURE] * vl
    out += ['{"cards": ["', '", "', '"], "number": [', ", ", '], "formula": "', '"}']
    return out + [str(n) for n in range(10, 14)] + ["24"]


# ----------------------------------------------------------------------------------------------------------------------
# The environment.

def recognized(answer, cards):
    """The share of the cards that an answer names, in any order, float in [0, 1]; 1.0 = all right, and not a card more.
    A list longer than four is divided by its own length: naming everything gains nothing. Never raises.

        recognized('{"cards": ["J", "J", 3, "K"]}', ["3", "J", "10", "K"])  ->  0.75
    """
    said = (last_json_object(answer) or {}).get("cards")
    said = list(map(str, said)) if isinstance(said, list) else []  # 3 counts as "3", as it does for judge_gp
    return (Counter(said) & Counter(cards)).total() / max(len(said), len(cards))


class GeneralPoints:
    """rule: "id" | "ood". split: "train" | "unseen" | "faces" (unseen hands with at least one of J, Q, K, on which the
    two rules differ). verify: attempts per hand, at least 1. seed: fixes the hands of reset() and, alone, which
    solution the expert shows for a hand. vl: show the cards in a picture. visual: its look, "id" | "ood"; pixels: its
    side, at least 40. Neither they nor vl change which hands are dealt. Raises ValueError on a value outside these."""
    title = "GeneralPoints"  # for people
    rule_names = {"id": "J, Q, K = 10", "ood": "J, Q, K = 11, 12, 13"}
    visual_names = {"id": "black suits", "ood": "red suits"}
    reward_scale = 5.0   # PPO divides rewards by this: a solved hand is worth 1
    default_verify = 5   # attempts per hand, as in the paper
    sft = dict(tokens=1.2e6, batch=128, lr=1e-3)  # defaults of sft.py and rl.py: compute X / 6N, episodes a step, ...
    sft_vl = sft
    ppo = dict(tokens=1.2e6, batch=128, lr=1e-4, lr_value=1e-3, gamma=1.0, clip_value=0.5, decay=0.0)
    ppo_vl = {**ppo, "decay": 0.5}  # reading suffers from the last steps at a constant rate
    # pretraining of the tiny model: compute, rows a step and their width, share of chats; then the same with pictures
    base = dict(tokens=3.6e6, batch=32, row_tokens=128, chat_share=0.08)
    base_vl = dict(tokens=5e6, batch=21, row_tokens=192, chat_share=0.12, vision_rate=0.3)  # chats are longer
    tiny = dict(model_type="llama")
    verdicts = tuple(GP_REWARD)  # every kind a step can report
    document = staticmethod(document)
    picture_document = staticmethod(picture_document)
    fragments = staticmethod(fragments)

    def __init__(self, rule="id", split="train", verify=5, seed=0, data=None, target=24, vl=False, visual="id",
                 pixels=80):
        if data is not None:
            raise ValueError("GeneralPoints deals its own hands and reads no --data")
        if rule not in RULES or split not in ("train", "unseen", "faces") or verify < 1 or target < 1:
            raise ValueError(f"GeneralPoints: bad {rule=}, {split=}, {verify=} or {target=}")
        if visual not in SUITS or pixels < 40:
            raise ValueError(f"GeneralPoints: bad {visual=} or {pixels=}")
        self.rule, self.split, self.verify, self.seed, self.target = rule, split, verify, seed, target
        self.vl, self.visual, self.pixels = vl, visual, pixels
        self.rng, self.stream, self.dealt = random.Random(f"gp/{seed}"), seed, 0

    @staticmethod
    def cells(rule, visual=None):
        """The table's columns for a model trained under `rule`: keywords of __init__. visual: the look trained on, for
        models that see; then the column "visual" has the trained rule in the other look."""
        other = "ood" if rule == "id" else "id"
        columns = {"seen": dict(rule=rule, split="train"), "id": dict(rule=rule, split="unseen"),
                   "ood": dict(rule=other, split="faces")}
        if visual is not None:
            columns = {column: dict(keywords, vl=True, visual=visual) for column, keywords in columns.items()}
            columns["visual"] = dict(columns["id"], visual="ood" if visual == "id" else "id")
        return columns

    def numbers_under(self, rule):
        return [card_number(rank, RULES[rule]) for rank in self.cards]

    def reset(self, seed=None):
        """Deal a hand: four ranks uniform over 13, again until it belongs to the split and can make the target."""
        if seed is not None:
            self.rng, self.stream, self.dealt = random.Random(f"gp/{seed}"), seed, 0
        self.dealt += 1
        while True:
            self.cards = self.rng.choices(RANKS, k=4)
            self.numbers = self.numbers_under(self.rule)
            key = tuple(sorted(self.numbers))
            if is_unseen(key) != (self.split == "train") and solutions(key, self.target) and (
                    self.split != "faces" or set(self.cards) & set("JQK")):
                break
        self.attempts = 0
        self.images, shown = [], self.cards
        if self.vl:  # drawn from a generator of its own: the dealing one goes on as it does without pictures
            self.images = [picture(self.cards, self.visual, self.pixels, f"{self.stream}/{self.dealt}")]
            shown = [IN_PICTURE]
        self.messages = [{"role": "user", "content": prompt_text(shown, RULES[self.rule], self.target)}]
        return self.messages, self.images

    def step(self, text):
        """Judge an attempt. A failed one is answered with feedback until `verify` attempts are used up."""
        verdict = judge_gp(text, self.numbers, self.target, cards=self.cards if self.vl else None)
        self.attempts += 1
        success = verdict.kind == "correct"
        done = success or self.attempts == self.verify
        other = self.numbers_under("ood" if self.rule == "id" else "id")
        differs = sorted(other) != sorted(self.numbers)
        info = {"verdict": verdict.kind, "success": success, "position_done": done, "position_solved": success,
                "rule_matters": differs, "other_rule": differs and sorted(verdict.numbers or []) == sorted(other),
                "recognized": recognized(text, self.cards) if self.vl else None}
        self.messages = self.messages + [{"role": "assistant", "content": text},
                                         {"role": "user", "content": verdict.feedback}]
        return Step(None if done else self.messages, [] if done else self.images, verdict.reward, done, info)

    def expert(self):
        """A random solution in a random order, always the same for a hand's numbers: seldom what the base would say."""
        options = solutions(tuple(sorted(self.numbers)), self.target)
        rng = random.Random(f"expert/{self.seed}/{sorted(self.numbers)}")
        return answer_text(self.cards, self.numbers, spell(rng.choice(options), rng))


def samples():
    """A sheet of sample pictures: for each look four hands at 80 pixels, three times enlarged, and one at 400."""
    sheet = Image.new("RGB", (2 * 240 + 400 + 40, 2 * 490 + 10), "white")
    for row, look in enumerate(SUITS):
        for i in range(4):
            small = picture([RANKS[(4 * i + j) % 13] for j in range(4)], look, 80, i).resize((240, 240), 0)  # nearest
            sheet.paste(small, (10 + 245 * (i % 2), 10 + 490 * row + 245 * (i // 2)))
        sheet.paste(picture(RANKS[8:12], look, 400, 2), (510, 50 + 490 * row))
    return sheet.quantize(64, Image.Quantize.MAXCOVERAGE, 3, dither=Image.Dither.NONE)  # 64 colours: a small file


if __name__ == "__main__":
    if sys.argv[1:]:
        if len(sys.argv) != 3 or sys.argv[1] != "--picture":
            sys.exit("error: usage: python env_gp.py [--picture FILE]")
        try:
            sys.exit(samples().save(sys.argv[2]))
        except (OSError, ValueError) as e:
            sys.exit(f"error: {sys.argv[2]}: {e}")
    env = GeneralPoints(rule="ood")
    messages, _ = env.reset(seed=0)
    print(messages[0]["content"], "\n\nexpert:", env.expert())
    print("\nwrong on purpose:", env.step(answer_text(env.cards, env.numbers, "1+1")))
    print("\nhands solvable with 1..13:", len(solvable_hands()), "of", len(all_hands()))
