"""verifier.py: what counts as right. Text goes in; a verdict with a reward and feedback comes out.

    python -c "from verifier import *; print(judge_gp('{\"formula\": \"8/(3-8/3)\"}', [3, 3, 8, 8]))"

This is the paper's outcome verifier VER. After its feedback the model may answer again (section 3,
"sequential revision"; rewards: appendix A.3 for GeneralPoints, B for V-IRL). All functions here are pure
functions of text and numbers, without a model, randomness or torch.
A formula is not handed to eval(). It is read by a small grammar, and its length, depth and numbers are
bounded, so no answer can raise, hang or take much memory (`9**9**9`, 10,000 brackets, ...). Values are exact:
with floats, as in the authors' release, the right answer 8/(3-8/3) would be rejected.
"""
import json
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_ANSWER = 4096   # characters; only the end of a longer answer is read
MAX_FORMULA = 128   # characters; a formula over four numbers needs about 20
MAX_DEPTH = 16      # nested brackets
MAX_DIGITS = 4      # digits of one number


# ------------------------------------------------------------------------------------------------------------
# What every environment's step() returns.

@dataclass
class Step:
    """One answer's outcome. An episode is a sequence of positions: one hand of cards, or places on a route.
    A position is done after a right answer, or when its attempts are used up.
    messages: the chat to answer next, None when the episode is over. At the same position it is the last chat
              plus the answer and a feedback turn. The next position begins a new chat.
    images:   the pictures in `messages` (PIL.Image), [] for tasks in words.
    reward:   float in the environment's own units, 5 for a solved hand. PPO divides it by env.reward_scale.
    info:     "verdict"          str, a key of the reward table
              "success"          the whole episode was solved; meaningful when done
              "position_done"    this answer was the last one at its position
              "position_solved"  this answer is right
              "rule_matters"     the right answer here differs between the two rules
              "recognized"       share of the picture's parts read right, in [0, 1]; None if words tell them
              "other_rule"       the answer follows the rule that is NOT in force"""
    messages: list | None
    images: list
    reward: float
    done: bool
    info: dict


@dataclass
class Verdict:
    """kind: a key of the reward table. feedback: why it failed, in words, never a piece of a solution.
    numbers: the integers a legal formula used, in order. action: a legal V-IRL action in its plain form."""
    kind: str
    reward: float
    feedback: str
    numbers: list | None = None
    action: str | None = None


# ------------------------------------------------------------------------------------------------------------
# Reading an answer.

def last_json_object(text):
    """The last {...} in `text` that is valid JSON, as a dict; None if there is none. Earlier ones are drafts.

        'Maybe {"formula": "1+1"}? No. {"formula": "4*6"}'  ->  {"formula": "4*6"}"""
    text = text[-MAX_ANSWER:]
    found, at = None, text.find("{")
    while at >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):  # bad JSON, or nested too deep
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

    Raises FormulaError for all else: other characters, an operator without a left side, unbalanced brackets,
    division by zero, or more than MAX_FORMULA, MAX_DEPTH or MAX_DIGITS."""
    if len(text) > MAX_FORMULA:
        raise FormulaError("it is too long")
    # [0-9] and not \d: \d also matches digits of other scripts. "" marks the end.
    tokens, numbers = [*re.findall(r"[0-9]+|\S", text), ""], []

    def parse_sum(depth):
        total = parse_product(depth)
        while tokens[0] in ("+", "-"):
            operator, right = tokens.pop(0), parse_product(depth)
            total = total + right if operator == "+" else total - right
        return total

    def parse_product(depth):
        product = parse_atom(depth)
        while tokens[0] in ("*", "/"):
            operator, right = tokens.pop(0), parse_atom(depth)
            if operator == "/" and right == 0:
                raise FormulaError("it divides by zero")
            product = product * right if operator == "*" else product / right
        return product

    def parse_atom(depth):
        token = tokens.pop(0)
        if token == "(":
            if depth == MAX_DEPTH:
                raise FormulaError("its brackets are nested too deep")
            inner = parse_sum(depth + 1)
            if tokens.pop(0) != ")":
                raise FormulaError("a bracket is not closed")
            return inner
        if not re.fullmatch("[0-9]+", token):
            raise FormulaError(f"{token!r} is in the wrong place" if token else "a number is missing")
        if len(token) > MAX_DIGITS:
            raise FormulaError("a number is too large")
        numbers.append(int(token))
        return Fraction(numbers[-1])

    value = parse_sum(0)
    if tokens != [""]:
        raise FormulaError("it goes on after its end")
    return value, numbers


# ------------------------------------------------------------------------------------------------------------
# GeneralPoints.

GP_REWARD = {"correct": 5.0, "wrong_value": -1.0, "misread": -1.5, "wrong_numbers": -2.0, "illegal": -3.0}
GP_FEEDBACK = {"correct": "Correct.", "wrong_value": "The formula does not make the target. Try again.",
               "misread": "The cards were misread. Try again.",
               "wrong_numbers": "The formula does not use each card's number once. Try again.",
               "illegal": "The answer has no legal formula in JSON: use only numbers, + - * / and round "
                          "brackets. Try again."}


def judge_gp(answer, numbers, target=24, cards=None):
    """Judge one GeneralPoints answer (paper, appendix A.3).
    answer:  str, whatever the model said. numbers: list of ints, the hand's under the rule in force.
    cards:   list of rank strings if they had to be read from a picture; None for the task in words.
    Returns a Verdict, decided in this order: no JSON -> illegal; cards misread; not a formula -> illegal;
    wrong numbers; wrong value. Never raises.

        judge_gp('{"formula": "(7-4)*8*1"}', [1, 4, 7, 8]).kind        ->  "correct"
        judge_gp('{"formula": "(7-4)*8*1=23"}', [1, 4, 7, 8]).kind     ->  "wrong_value", by its own claim"""
    def verdict(kind, used=None):
        return Verdict(kind, GP_REWARD[kind], GP_FEEDBACK[kind], used)

    fields = last_json_object(answer)
    if fields is None:
        return verdict("illegal")
    said, formula = fields.get("cards"), fields.get("formula")
    if cards is not None and (not isinstance(said, list) or sorted(map(str, said)) != sorted(cards)):
        return verdict("misread")
    # The formula and, if there is one, the total that it claims: "4*6 = 24".
    form = rf"([^=]*)(?:=\s*([0-9]{{1,{MAX_DIGITS}}})\s*)?"
    match = re.fullmatch(form, formula) if isinstance(formula, str) else None
    if match is None:
        return verdict("illegal")
    try:
        value, used = evaluate_formula(match[1])
    except FormulaError:
        return verdict("illegal")
    if sorted(used) != sorted(numbers):
        return verdict("wrong_numbers", used)
    claimed = int(match[2] or target)
    return verdict("correct" if value == claimed == target else "wrong_value", used)


# ------------------------------------------------------------------------------------------------------------
# V-IRL.

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
RELATIVE = ("left", "right", "slightly left", "slightly right")
VIRL_REWARD = {"correct": 1.0, "wrong_action": -1.0, "wrong_intersection": -1.5, "illegal": -1.0}
VIRL_FEEDBACK = {"correct": "Correct.", "wrong_action": "The action is wrong here. Try again.",
                 "wrong_intersection": "Check the observation for an intersection. Try again.",
                 "illegal": "The answer has no legal action in JSON: write one exactly as it is listed. "
                            "Try again."}
ACTION = re.compile(r"forward\(\)|stop\(\)|"
                    rf"""turn_direction\( *(["']?) *({"|".join(COMPASS + RELATIVE)}) *\1 *\)""")


def compass_word(heading):
    """Heading in degrees (0 = north, clockwise, any real number) -> one of eight words: 350 -> "north"."""
    return COMPASS[int((heading + 22.5) % 360 // 45) % 8]


def relative_word(old, new):
    """The turn from heading `old` to heading `new`, in degrees -> "left", "right", "slightly left" or
    "slightly right". Slightly: by 45 degrees or less. 0 degrees are slightly right, 180 are left.

        relative_word(10, 280)  ->  "left"      relative_word(350, 10)  ->  "slightly right", by 20 degrees"""
    delta = (new - old + 180) % 360 - 180  # [-180, 180): negative is to the left
    return ("" if abs(delta) > 45 else "slightly ") + ("left" if delta < 0 else "right")


def says_intersection(observation):
    """Does a text claim an intersection? "intersection with no landmark" does, "no intersection" does not."""
    text = re.sub(r"\b(no|without)( \w+)? landmarks?\b", "", observation.lower())
    return any("intersection" in part and not re.search(r"\b(no|not|without|never)\b|n't\b", part)
               for part in re.split(r"[,.;:\n]|\b(?:but|and)\b", text))


def judge_virl(answer, action, at_intersection):
    """Judge one V-IRL answer (paper, appendix B).
    answer:          str, whatever the model said: JSON with "current observation" (a text) and "action".
    action:          the right action in its plain form: "forward()" or "turn_direction(slightly left)", say.
    at_intersection: whether the observation that was shown says "intersection".
    Returns a Verdict, decided in this order: no JSON or no legal action -> illegal; a wrong claim about
    standing at an intersection; wrong action. A word of the other rule is legal, and wrong. Never raises.

        judge_virl('{"action": "stop()"}', "forward()", False).kind  ->  "wrong_action", for -1.0"""
    fields = last_json_object(answer) or {}
    said, observation = fields.get("action"), fields.get("current observation")
    match = ACTION.fullmatch(said) if isinstance(said, str) else None
    plain = match and (f"turn_direction({match[2]})" if match[2] else said)  # without quotes and spaces
    if match is None:
        kind = "illegal"
    elif says_intersection(observation if isinstance(observation, str) else "") != at_intersection:
        kind = "wrong_intersection"
    else:
        kind = "correct" if plain == action else "wrong_action"
    return Verdict(kind, VIRL_REWARD[kind], VIRL_FEEDBACK[kind], action=plain)
