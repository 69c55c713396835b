"""verifier.py: what counts as right. Text goes in, a verdict with a reward and feedback comes out.

    python -c "from verifier import judge_gp; print(judge_gp('{\"formula\": \"8/(3-8/3)\"}', [3, 3, 8, 8]))"

This is the paper's outcome verifier VER (section 3, "sequential revision"; rewards: appendix A.3 for
GeneralPoints, B for V-IRL). No model, no randomness, no torch: pure functions of text and numbers, so each can be
tested alone.

Departures from the authors' release
  - Values are exact fractions. A float verifier rejects 8/(3-8/3) = 24, which is right.
  - Nothing is handed to eval(). A formula goes through the three-rule grammar below, and its length, depth and
    number size are bounded, so no answer can raise, hang or take much memory (`9**9**9`, 10,000 brackets, ...).
  - One verdict per answer; penalties never add up.
  - Turns wrap around: from 350 to 10 degrees is 20 to the right. The release compares bare numbers, so a quarter of all
    pairs of headings get the wrong word.
"""
import json
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_ANSWER = 4096   # characters; of a longer answer only the end is read (that is where the JSON stands)
MAX_FORMULA = 128   # characters; a formula over four numbers needs about 20
MAX_DEPTH = 16      # nested brackets
MAX_DIGITS = 4      # digits of one number


# ----------------------------------------------------------------------------------------------------------------------
# The protocol: what every environment's step() returns.

@dataclass
class Step:
    """One answer's outcome.

    messages: the chat to answer next, or None when the episode is over. If it begins with the chat answered last,
              the same conversation goes on (a feedback turn was added); otherwise a fresh one begins.
    images:   pictures shown in `messages` (PIL.Image), [] for language tasks.
    reward:   float, the environment's own units (5 = a solved hand); PPO divides by env.reward_scale.
    info:     a dict of
              "verdict"          str, a key of the reward table
              "success"          the whole episode was solved (meaningful when done)
              "position_done"    this answer was the last one at its position: a hand in GeneralPoints, which has one
                                 position an episode, a place on the route in V-IRL, which has many
              "position_solved"  this answer is right
              "rule_matters"     the right answer here differs between the two rules
              "recognized"       share of the picture's parts that the answer read right, in [0, 1]; None without one
                                 or where the prompt tells what it shows
              "working"          V-IRL alone: what the answer says before its action, the current instruction, is right
              "other_rule"       the answer follows the rule that is NOT in force, i.e. on held-out episodes the trained
                                 rule remembered
    """
    messages: list | None
    images: list
    reward: float
    done: bool
    info: dict


@dataclass
class Verdict:
    """kind: one of the keys of the reward table; feedback: why it failed, in words, never a piece of a solution;
    numbers: the integers a legal formula used, in order, else None; action: a legal V-IRL action in its plain form."""
    kind: str
    reward: float
    feedback: str
    numbers: list | None = None
    action: str | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Reading an answer.

def last_json_object(text):
    """The last {...} in `text` that is valid JSON, as a dict; None if there is none.

    The last, because a model that thinks aloud may write drafts first:
        'Maybe {"formula": "1+1"}? No. {"formula": "4*6"}'  ->  {"formula": "4*6"}
    """
    text = text[-MAX_ANSWER:]
    decoder, found, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):  # ValueError covers bad JSON and integers of over 4,300 digits
            end = at + 1
        at = text.find("{", end)
    return found


class FormulaError(ValueError):
    """The text is not a legal formula; the message says why."""


def evaluate_formula(text):
    """Exact value of a formula over non-negative integers -> (Fraction, [the integers in order]).

        sum     := product (("+" | "-") product)*
        product := atom (("*" | "/") atom)*
        atom    := integer | "(" sum ")"

        evaluate_formula("8/(3-8/3)")  ->  (Fraction(24, 1), [8, 3, 8, 3])

    Raises FormulaError for everything else: other characters, a sign without a left side, unbalanced brackets,
    division by zero, or a bound (MAX_FORMULA, MAX_DEPTH, MAX_DIGITS) exceeded.
    """
    if len(text) > MAX_FORMULA:
        raise FormulaError("it is too long")
    # [0-9], not \d: \d also matches digits of other scripts, which int() would accept.
    tokens = re.findall(r"[0-9]+|\S", text)
    numbers, at = [], 0

    def accept(options):  # the next token if it is one of `options`, else None
        nonlocal at
        if at < len(tokens) and tokens[at] in options:
            at += 1
            return tokens[at - 1]

    def parse_sum(depth):
        value = parse_product(depth)
        while sign := accept("+-"):
            right = parse_product(depth)
            value = value + right if sign == "+" else value - right
        return value

    def parse_product(depth):
        value = parse_atom(depth)
        while sign := accept("*/"):
            right = parse_atom(depth)
            if sign == "/" and right == 0:
                raise FormulaError("it divides by zero")
            value = value * right if sign == "*" else value / right
        return value

    def parse_atom(depth):
        nonlocal at
        if accept("("):
            if depth == MAX_DEPTH:
                raise FormulaError("its brackets are nested too deep")
            value = parse_sum(depth + 1)
            if not accept(")"):
                raise FormulaError("a bracket is not closed")
            return value
        if at == len(tokens) or not re.fullmatch("[0-9]+", tokens[at]):
            raise FormulaError("a number is missing" if at == len(tokens) else "it has a sign in the wrong place")
        if len(tokens[at]) > MAX_DIGITS:
            raise FormulaError("a number is too large")
        numbers.append(int(tokens[at]))
        at += 1
        return Fraction(numbers[-1])

    value = parse_sum(0)
    if at < len(tokens):
        raise FormulaError("it goes on after its end")
    return value, numbers


# ----------------------------------------------------------------------------------------------------------------------
# GeneralPoints.

GP_REWARD = {"correct": 5.0, "wrong_value": -1.0, "misread": -1.5, "wrong_numbers": -2.0, "illegal": -3.0}
GP_FEEDBACK = {
    "correct": "Correct.",
    "wrong_value": "The formula does not make the target. Try again.",
    "misread": "The cards were misread. Try again.",
    "wrong_numbers": "The formula does not use each card's number once. Try again.",
    "illegal": "The answer has no legal formula. Try again.",
}


def judge_gp(answer, numbers, target=24, cards=None):
    """Judge one GeneralPoints answer (paper, appendix A.3).

    answer:  str, whatever the model said.
    numbers: list of ints, the hand's numbers under the rule in force.
    cards:   list of rank strings when they had to be read from a picture; None for the language task.
    Returns a Verdict. Decided in this order: no JSON -> illegal; cards misread; not a formula -> illegal; wrong
    numbers; wrong value. Never raises.

        judge_gp('{"formula": "(7-4)*8*1"}', [1, 4, 7, 8]).kind        ->  "correct"
        judge_gp('{"formula": "(7-4)*8*1=23"}', [1, 4, 7, 8]).kind     ->  "wrong_value": it claims a wrong total
    """
    def verdict(kind, used=None):
        return Verdict(kind, GP_REWARD[kind], GP_FEEDBACK[kind], used)

    fields = last_json_object(answer)
    if fields is None:
        return verdict("illegal")
    if cards is not None:
        said = fields.get("cards")
        if not isinstance(said, list) or sorted(map(str, said)) != sorted(cards):
            return verdict("misread")
    formula = fields.get("formula")
    if not isinstance(formula, str):
        return verdict("illegal")
    formula, equals, claim = formula.partition("=")
    claim = claim.strip()
    if equals and not re.fullmatch(f"[0-9]{{1,{MAX_DIGITS}}}", claim):
        return verdict("illegal")
    try:
        value, used = evaluate_formula(formula)
    except FormulaError:
        return verdict("illegal")
    if sorted(used) != sorted(numbers):
        return verdict("wrong_numbers", used)
    if value != target or (equals and int(claim) != target):
        return verdict("wrong_value", used)
    return verdict("correct", used)


# ----------------------------------------------------------------------------------------------------------------------
# V-IRL.

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
RELATIVE = ("left", "right", "slightly left", "slightly right")
VIRL_REWARD = {"correct": 1.0, "wrong_action": -1.0, "wrong_intersection": -1.5, "illegal": -1.0}
VIRL_FEEDBACK = {
    "correct": "Correct.",
    "wrong_action": "The action is wrong here. Try again.",
    "wrong_intersection": "Check the observation for an intersection. Try again.",
    "illegal": "The answer has no legal action. Try again.",
}
ACTION = re.compile(rf"""forward\(\)|stop\(\)|turn_direction\( *(["']?) *({"|".join(COMPASS + RELATIVE)}) *\1 *\)""")


def compass_word(heading):
    """Heading in degrees (0 = north, clockwise, any real number) -> one of eight words, 45 degrees each.

        compass_word(350)  ->  "north"        compass_word(298)  ->  "northwest"
    """
    return COMPASS[int((heading + 22.5) % 360 // 45) % 8]


def relative_word(old, new):
    """The turn from heading `old` to heading `new`, both in degrees -> "left", "right", "slightly left" or "slightly
    right". Slightly: by 45 degrees or less. No turn at all counts as slightly right, a turn about as left.

        relative_word(350, 10)  ->  "slightly right"        relative_word(10, 280)  ->  "left"
    """
    delta = (new - old + 180) % 360 - 180  # [-180, 180): negative is to the left
    return ("" if abs(delta) > 45 else "slightly ") + ("left" if delta < 0 else "right")


def says_intersection(observation):
    return "intersection" in observation.lower()


def judge_virl(answer, action, at_intersection):
    """Judge one V-IRL answer (paper, appendix B).

    answer:          str, whatever the model said: JSON with "current observation" (a text) and "action".
    action:          the right action in its plain form, e.g. "forward()" or "turn_direction(slightly left)".
    at_intersection: whether the observation that was shown says "intersection".
    Returns a Verdict. Decided in this order: no JSON or no legal action -> illegal; an observation that claims an
    intersection where none was shown, or the reverse; wrong action. A word of the other rule is legal, and wrong.
    Spaces and quotes around the direction are let pass, nothing else. Never raises.

        judge_virl('{"current observation": "nothing nearby", "action": "stop()"}', "forward()", False).reward  ->  -1.0
    """
    fields = last_json_object(answer) or {}
    said, seen = fields.get("action"), fields.get("current observation")
    match = ACTION.fullmatch(said) if isinstance(said, str) else None
    if match is None:
        return Verdict("illegal", VIRL_REWARD["illegal"], VIRL_FEEDBACK["illegal"])
    said = f"turn_direction({match[2]})" if match[2] else said
    if says_intersection(seen if isinstance(seen, str) else "") != at_intersection:
        kind = "wrong_intersection"
    else:
        kind = "correct" if said == action else "wrong_action"
    return Verdict(kind, VIRL_REWARD[kind], VIRL_FEEDBACK[kind], action=said)
