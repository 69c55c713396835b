"""env_gp.py: GeneralPoints. Make 24 from four cards (paper, section 4.1).

    python env_gp.py            # shows a hand, the prompt, the expert's answer and a failed attempt

An environment is one class, and sft.py, rl.py and eval.py use nothing of it but:
    reset(seed) -> (messages, images)    deal an episode; the same seed deals the same hand
    step(text)  -> Step                  judge an answer (see verifier.Step)
    expert()    -> str                   a right answer to the current state, for demonstrations
    cells(rule) -> {column: keywords}    which episodes the table's columns seen / id / ood are made of
    document(rng, chat_share)            pretraining text for the tiny model
    fragments() -> [str]                 its fixed phrases, for the tokenizer
    title, rule_names, reward_scale, default_verify, batch, row_tokens, verdicts      constants, commented below

Rules (the paper's Rule Variation): "id" counts J, Q, K as 10; "ood" counts them as 11, 12, 13. Everything else is
the same, and the prompt states the rule. Hands are split by the multiset of their numbers: 80% for training, 20%
unseen. The split is over fine-tuning only: the base, like a web-scale model, has met arithmetic of all kinds.
"""
import hashlib
import json
import random
import re
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement
from string import Template

from verifier import GP_FEEDBACK, GP_REWARD, Step, judge_gp

RANKS = ["A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K"]
RULES = {"id": (10, 10, 10), "ood": (11, 12, 13)}  # what J, Q, K count as


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
# The words. Fixed wording between $slots becomes a few tokens of the tiny model's tokenizer.

RULE = Template("A is 1; J is $j; Q is $q; K is $k")
PROMPT = Template("Make $target from the four cards below, using the number of each card exactly once, with + - * / "
                  "and brackets.\nRule: $rule.\nCards: $cards.\n"
                  'Answer in JSON only: {"cards": [ranks], "number": [numbers], "formula": "..."}')
GAME = Template("A game of cards. Rule: $rule.\nCards: $cards.\nNumbers: [$number], formula: $formula")
FACT = Template("Numbers: [$number], formula: $formula")


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


def chat(rng, noise):
    """A game in the task's own form: attempts, wrong with probability `noise`, until one is right or five failed."""
    faces, cards, numbers = game(rng)
    messages = [{"role": "user", "content": prompt_text(cards, faces)}]
    for _ in range(5):
        text = answer_text(cards, numbers, some_formula(numbers, rng, noise))
        verdict = judge_gp(text, numbers)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": verdict.feedback}]
        if verdict.kind == "correct":
            break
    return messages[:-1]


def document(rng, chat_share=0.08, noise=0.1):
    """One pretraining document: a str, or with probability chat_share a list of chat messages.

    noise: the share of wrong formulas (three times that in chats, so that there is feedback to learn from)."""
    kind = rng.random()
    if kind < chat_share:
        return chat(rng, 3 * noise)
    if kind < (1 + chat_share) / 2:  # a bare fact about four numbers
        numbers = list(rng.choice(solvable_hands()))
        rng.shuffle(numbers)
        return FACT.substitute(number=str(numbers)[1:-1], formula=some_formula(numbers, rng, noise))
    faces, cards, numbers = game(rng)
    return GAME.substitute(rule=rule_text(faces), cards=", ".join(cards), number=str(numbers)[1:-1],
                           formula=some_formula(numbers, rng, noise))


def fragments():
    """The fixed phrases of all texts above, for training a tokenizer in which each is a few tokens."""
    texts = [t.template for t in (RULE, PROMPT, GAME, FACT)] + list(GP_FEEDBACK.values())
    out = [piece for text in texts for piece in re.split(r"\$\w+", text) if piece]
    out += ['{"cards": ["', '", "', '"], "number": [', ", ", '], "formula": "', '"}']
    return out + [str(n) for n in range(10, 14)] + ["24"]


# ----------------------------------------------------------------------------------------------------------------------
# The environment.

class GeneralPoints:
    """rule: "id" | "ood". split: "train" | "unseen" | "faces" (unseen hands with at least one of J, Q, K, on which the
    two rules differ). verify: attempts per hand, at least 1. seed: fixes the hands of reset() and, alone, which
    solution the expert shows for a hand. Raises ValueError on a value outside these."""
    title = "GeneralPoints"  # for people
    rule_names = {"id": "J, Q, K = 10", "ood": "J, Q, K = 11, 12, 13"}
    reward_scale = 5.0   # PPO divides rewards by this: a solved hand is worth 1
    default_verify = 5   # attempts per hand, as in the paper
    batch = 128          # episodes a step of SFT and PPO, by default
    row_tokens = 128     # width of a pretraining row
    verdicts = tuple(GP_REWARD)  # every kind a step can report
    document = staticmethod(document)
    fragments = staticmethod(fragments)

    def __init__(self, rule="id", split="train", verify=5, seed=0, data=None, target=24):
        if data is not None:
            raise ValueError("GeneralPoints deals its own hands and reads no --data")
        if rule not in RULES or split not in ("train", "unseen", "faces") or verify < 1 or target < 1:
            raise ValueError(f"GeneralPoints: bad {rule=}, {split=}, {verify=} or {target=}")
        self.rule, self.split, self.verify, self.seed, self.target = rule, split, verify, seed, target
        self.rng = random.Random(f"gp/{seed}")

    @staticmethod
    def cells(rule):
        """The table's columns for a model trained under `rule`: keywords of __init__."""
        other = "ood" if rule == "id" else "id"
        return {"seen": dict(rule=rule, split="train"), "id": dict(rule=rule, split="unseen"),
                "ood": dict(rule=other, split="faces")}

    def numbers_under(self, rule):
        return [card_number(rank, RULES[rule]) for rank in self.cards]

    def reset(self, seed=None):
        """Deal a hand: four ranks uniform over 13, again until it belongs to the split and can make the target."""
        if seed is not None:
            self.rng = random.Random(f"gp/{seed}")
        while True:
            self.cards = self.rng.choices(RANKS, k=4)
            self.numbers = self.numbers_under(self.rule)
            key = tuple(sorted(self.numbers))
            if is_unseen(key) != (self.split == "train") and solutions(key, self.target) and (
                    self.split != "faces" or set(self.cards) & set("JQK")):
                break
        self.attempts = 0
        self.messages = [{"role": "user", "content": prompt_text(self.cards, RULES[self.rule], self.target)}]
        return self.messages, []

    def step(self, text):
        """Judge an attempt. A failed one is answered with feedback until `verify` attempts are used up."""
        verdict = judge_gp(text, self.numbers, self.target)
        self.attempts += 1
        success = verdict.kind == "correct"
        done = success or self.attempts == self.verify
        other = self.numbers_under("ood" if self.rule == "id" else "id")
        differs = sorted(other) != sorted(self.numbers)
        info = {"verdict": verdict.kind, "success": success, "position_done": done, "position_solved": success,
                "rule_matters": differs, "other_rule": differs and sorted(verdict.numbers or []) == sorted(other)}
        self.messages = self.messages + [{"role": "assistant", "content": text},
                                         {"role": "user", "content": verdict.feedback}]
        return Step(None if done else self.messages, [], verdict.reward, done, info)

    def expert(self):
        """A random solution in a random order, always the same for a hand's numbers: seldom what the base would say."""
        options = solutions(tuple(sorted(self.numbers)), self.target)
        rng = random.Random(f"expert/{self.seed}/{sorted(self.numbers)}")
        return answer_text(self.cards, self.numbers, spell(rng.choice(options), rng))


if __name__ == "__main__":
    env = GeneralPoints(rule="ood")
    messages, _ = env.reset(seed=0)
    print(messages[0]["content"], "\n\nexpert:", env.expert())
    print("\nwrong on purpose:", env.step(answer_text(env.cards, env.numbers, "1+1")))
    print("\nhands solvable with 1..13:", len(solvable_hands()), "of", len(all_hands()))
