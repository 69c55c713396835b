"""test_class.py: the class's tests can tell right from wrong, and make.py does what it says.

    python assignments/test_class.py             # 90 s of processor time; ends with "N passed, N failed"
    python assignments/test_class.py -v          # also what each wrong answer is told

Below are wrong answers as a student would give them, each with its reason: whole function bodies, or a right
one and what is changed in it. Right answers differ from the repository's. The tests assert that each wrong
one fails its exercise, and that each right one and the solution pass. The bodies look names up in their
exercise's module, so they use names that this file does not define (forward, torch, ...). Only the instructor
gets this file.
"""
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import types
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads only wait for each other
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [HERE, ROOT]
import make  # noqa: E402
import solutions as additions  # noqa: E402
from exercises import EXERCISES, complaint  # noqa: E402

WRONG, RIGHT = [], []  # (exercise, reason, function)


def wrong(exercise, reason):
    return lambda function: WRONG.append((exercise, reason, function))


def right(exercise, way):
    return lambda function: RIGHT.append((exercise, way, function)) or function


def body(function):
    """The lines of a function below its first one -> str."""
    text = textwrap.dedent(inspect.getsource(function))
    return text[text.index("):\n") + 3:]


def slip(exercise, reason, function, *changes):
    """A wrong answer: a right one in which (old, new) pieces of text are changed."""
    text = f"def _{inspect.signature(function)}:\n" + body(function)
    for old, new in changes:
        assert text.count(old) == 1, (reason, old, text.count(old))
        text = text.replace(old, new)
    WRONG.append((exercise, reason, text))


# ------------------------------------------------------------------------------------------------------------
# Sheet 1.

@right("relative_word", "in one line")
def word(old, new):
    delta = (new - old + 180) % 360 - 180
    return ("" if abs(delta) > 45 else "slightly ") + ("left" if delta < 0 else "right")


slip("relative_word", "headings are not wrapped: from 350 to 10 degrees is 340 to the left", word,
     ("(new - old + 180) % 360 - 180", "new - old"))
slip("relative_word", "the sign is turned", word, ("new - old", "old - new"))
slip("relative_word", "degrees are cut to integers", word, ("(new - old", "(int(new - old)"))
slip("relative_word", "45 degrees are not slight any more", word, ("abs(delta) > 45", "abs(delta) >= 45"))
slip("relative_word", "a turn by 180 degrees is right: (-180, 180] in place of [-180, 180)", word,
     ("(new - old + 180) % 360 - 180", "180 - (old - new + 180) % 360"))


@right("judge_gp", "what the formula claims is read by partition()")
def judge(answer, numbers, target=24, cards=None):
    def verdict(kind, used=None):
        return Verdict(kind, GP_REWARD[kind], GP_FEEDBACK[kind], used)
    fields = last_json_object(answer)
    if fields is None:
        return verdict("illegal")
    if cards is not None:
        said = fields.get("cards")
        if not isinstance(said, list):
            return verdict("misread")
        said = [str(card) for card in said]
        if sorted(said) != sorted(cards):
            return verdict("misread")
    formula = fields.get("formula")
    if not isinstance(formula, str):
        return verdict("illegal")
    text, sign, claim = formula.partition("=")
    if sign and not re.fullmatch("[0-9]{1,4}", claim.strip()):
        return verdict("illegal")
    try:
        value, used = evaluate_formula(text)
    except FormulaError:
        return verdict("illegal")
    if sorted(used) != sorted(numbers):
        return verdict("wrong_numbers", used)
    if value != target or (sign and int(claim) != target):
        return verdict("wrong_value", used)
    return verdict("correct", used)


NUMBERS = """    if sorted(used) != sorted(numbers):
        return verdict("wrong_numbers", used)
"""
VALUE = """    if value != target or (sign and int(claim) != target):
        return verdict("wrong_value", used)
"""
CLAIM = """    if sign and not re.fullmatch("[0-9]{1,4}", claim.strip()):
        return verdict("illegal")
"""
slip("judge_gp", "the value is judged before the numbers", judge, (NUMBERS + VALUE, VALUE + NUMBERS))
slip("judge_gp", "the formula is judged before the cards", judge,
     ("    if cards is not None:", """    try:
        evaluate_formula(str(fields.get("formula")).partition("=")[0])
    except FormulaError:
        return verdict("illegal")
    if cards is not None:"""))
slip("judge_gp", "numbers are compared as sets: an 8 too many goes unnoticed", judge,
     ("sorted(used) != sorted(numbers)", "set(used) != set(numbers)"))
slip("judge_gp", "what the formula claims behind = is not looked at", judge,
     (" or (sign and int(claim) != target)", ""))
slip("judge_gp", "what the formula claims is judged before its numbers", judge,
     (NUMBERS, """    if sign and int(claim) != target:
        return verdict('wrong_value', used)
""" + NUMBERS))
slip("judge_gp", "the value is cut to an integer: 24.5 is 24", judge, ("if value !=", "if int(value) !="))
slip("judge_gp", "the value is rounded: 24.5 is 24", judge, ("if value !=", "if round(value) !="))
slip("judge_gp", "the value is rounded up: 23.5 is 24", judge, ("if value !=", "if math.ceil(value) !="),
     ("    fields =", "    import math\n    fields ="))
slip("judge_gp", "empty JSON is taken for none: the cards are misread there", judge,
     ("if fields is None", "if not fields"))
slip("judge_gp", "a second = and what is behind it are not looked at", judge,
     ('formula.partition("=")', '"=".join(formula.split("=")[:2]).partition("=")'))
LIST = """said, list):
            return verdict("misread\""""
slip("judge_gp", "misread cards with the hand's numbers", judge, (LIST, LIST + ", numbers"))
slip("judge_gp", "the cards must be read in the order shown", judge,
     ("sorted(said) != sorted(cards)", "said != cards"))
slip("judge_gp", "wrong numbers without the numbers: the column of the other rule would be 0", judge,
     ('verdict("wrong_numbers", used)', 'verdict("wrong_numbers")'))
slip("judge_gp", "a wrong value without the numbers", judge,
     ('verdict("wrong_value", used)', 'verdict("wrong_value")'))
slip("judge_gp", "the numbers in another order", judge,
     ('verdict("correct", used)', 'verdict("correct", sorted(used))'))
slip("judge_gp", "the caller's hand is sorted", judge, ("    fields =", "    numbers.sort()\n    fields ="))
slip("judge_gp", "cards that are no list raise", judge,
     ("        if not isinstance(said, list):", "        if said is None or isinstance(said, str):"))
slip("judge_gp", "cards in lists raise", judge,
     ("[str(card) for card in said]", "[{int: str, str: str}[type(c)](c) for c in said]"))
slip("judge_gp", "a division by zero raises", judge,
     ("value, used = evaluate_formula(text)", """used = [int(n) for n in re.findall("[0-9]+", text)]
        value = eval(re.sub("([0-9]+)", r"Fraction(\\1)", text))"""),
     ("except FormulaError", "except SyntaxError"))
slip("judge_gp", "a claim that is no integer raises", judge, (CLAIM, CLAIM.replace("[0-9]{1,4}", ".+")))
slip("judge_gp", "a claim may have a sign or a fraction", judge,
     (CLAIM, CLAIM.replace("[0-9]{1,4}", "[-+]?[0-9]{1,4}([.]0*)?")), ("int(claim)", "float(claim)"))
slip("judge_gp", "a claim of any length", judge, (CLAIM, CLAIM.replace("{1,4}", "+")))
slip("judge_gp", "a claim in digits of other scripts", judge, (CLAIM, CLAIM.replace("[0-9]", r"\\d")))
slip("judge_gp", "nothing behind = is a claim too", judge, (CLAIM, CLAIM.replace("{1,4}", "{0,4}")),
     ("sign and int", "claim.strip() and int"))
slip("judge_gp", "a formula that is missing or a number raises", judge,
     ("    if not isinstance(formula, str):\n", "    if formula is None:\n"))


@wrong("solutions", "only joins of one number with three: (a+b)*(c+d) is missing")
def _(numbers, target=24):
    found = set()
    for left, right in partitions(numbers, 1):
        for x, a in ((x, a) for x, of in reachable(left).items() for a in of):
            for y, b in ((y, b) for y, of in reachable(right).items() for b in of):
                for sign, value in (("+", x + y), ("-", x - y), ("*", x * y)):
                    found |= {combine(sign, a, b)} if value == target else set()
                if y - x == target:
                    found.add(combine("-", b, a))
                if y and x / y == target:
                    found.add(combine("/", a, b))
                if x and y / x == target:
                    found.add(combine("/", b, a))
    return tuple(sorted(map(write, found), key=lambda s: (len(s), s)))


@wrong("solutions", "the right part is never divided or lessened by the left")
def _(numbers, target=24):
    found = set()
    for left, right in partitions(numbers, 2):
        for x, a in ((x, a) for x, of in reachable(left).items() for a in of):
            for y, b in ((y, b) for y, of in reachable(right).items() for b in of):
                for sign, value in (("+", x + y), ("-", x - y), ("*", x * y), ("/", x / y if y else None)):
                    if value == target:
                        found.add(combine(sign, a, b))
    return tuple(sorted(map(write, found), key=lambda s: (len(s), s)))


@wrong("solutions", "sorted by the alphabet and not by length")
def _(numbers, target=24):
    return tuple(sorted(map(write, reachable(numbers).get(Fraction(target), ()))))


@wrong("solutions", "in floats: 8/(3-8/3) is not 24")
def _(numbers, target=24):
    found = [e for of in reachable(numbers).values() if eval(write(next(iter(of)))) == target for e in of]
    return tuple(sorted(map(write, found), key=lambda s: (len(s), s)))


@wrong("solutions", "always 24, whatever the target")
def _(numbers, target=24):
    return tuple(sorted(map(write, reachable(numbers).get(Fraction(24), ())), key=lambda s: (len(s), s)))


@right("GeneralPoints.step", "with an if for each part")
def play(self, text):
    shown = self.cards if self.vl else None
    verdict = judge_gp(text, self.numbers, cards=shown)
    solved = verdict.kind == "correct"
    self.attempts = self.attempts + 1
    over = solved or self.attempts >= self.verify
    rule = OTHER[self.rule]
    other = sorted(numbers_of(self.cards, RULES[rule]))
    matters = other != sorted(self.numbers)
    info = {"verdict": verdict.kind, "success": solved, "position_done": over, "position_solved": solved,
            "rule_matters": matters, "recognized": None, "other_rule": False}
    if matters and verdict.numbers is not None:
        info["other_rule"] = sorted(verdict.numbers) == other
    if self.vl:
        info["recognized"] = recognized(text, self.cards)
    self.messages = [*self.messages, {"role": "assistant", "content": text},
                     {"role": "user", "content": verdict.feedback}]
    if over:
        return Step(None, [], verdict.reward, True, info)
    return Step(self.messages, self.images, verdict.reward, False, info)


slip("GeneralPoints.step", "one attempt too many", play, ("self.attempts >= self", "self.attempts > self"))
slip("GeneralPoints.step", "the caller's list of messages grows", play,
     ("self.messages = [*self.messages, {", "self.messages += [{"))
slip("GeneralPoints.step", "the conversation is not kept for the next step", play,
     ("self.messages = [*self", "messages = [*self"), ("Step(self.messages", "Step(messages"))
slip("GeneralPoints.step", "without a face card every right answer counts as the other rule's", play,
     ("if matters and verdict", "if verdict"))
slip("GeneralPoints.step", "the other rule is always ood", play, ("OTHER[self.rule]", '"ood"'))
slip("GeneralPoints.step", "the other rule's numbers in the order of the cards only", play,
     ("sorted(verdict.numbers) == other", "verdict.numbers == numbers_of(self.cards, RULES[rule])"))
slip("GeneralPoints.step", "an answer without numbers raises", play,
     ("if matters and verdict.numbers is not None", "if matters"))
slip("GeneralPoints.step", "success is claimed whenever the episode is over", play,
     ('"success": solved', '"success": over'))
slip("GeneralPoints.step", "the cards are given to judge_gp() in words too", play,
     ("self.cards if self.vl else None", "self.cards"))
slip("GeneralPoints.step", "cards are recognized in words too", play, ("    if self.vl:\n", "    if True:\n"))
slip("GeneralPoints.step", "the pictures are shown again when the episode is over", play,
     ("Step(None, [], ", "Step(None, self.images, "))


# ------------------------------------------------------------------------------------------------------------
# Sheet 2.

@right("Segment.add", "in three lines")
def add(self, ids, action):
    self.ids = self.ids + ids
    self.action_mask += [action] * (len(self.ids) - len(self.action_mask))
    self.reward += [0.0] * (len(self.ids) - len(self.reward))


slip("Segment.add", "the prompt's ids, which have no action yet, are forgotten", add,
     ("(len(self.ids) - len(self.action_mask))", "len(ids)"),
     ("(len(self.ids) - len(self.reward))", "len(ids)"))
slip("Segment.add", "the reward is left behind", add,
     ("    self.reward += [0.0] * (len(self.ids) - len(self.reward))\n", ""))
slip("Segment.add", "the list that the caller holds grows", add, ("self.ids = self.ids +", "self.ids +="))
slip("Segment.add", "earlier tokens get this action too, earlier rewards are lost", add,
     ("+= [action] * (len(self.ids) - len(self.action_mask))", "= [action] * len(self.ids)"),
     ("+= [0.0] * (len(self.ids) - len(self.reward))", "= [0.0] * len(self.ids)"))


@right("glue_ids", "what the turn ends with is taken off")
def glue(tok, messages, last_id=None):
    form = turn_form(tok, tok.chat_template)
    last, between = form.last, form.between
    text = around_answer(tok, messages)[1] + form.header
    ids = tok(text, add_special_tokens=False).input_ids
    if last_id is None or not last and between[-1:] != [last_id]:
        return ids
    return ids[len(between):]


ENDS = """    if last_id is None or not last and between[-1:] != [last_id]:
        return ids
    return ids[len(between):]
"""
slip("glue_ids", "the end of turn is repeated where the model has said it", glue, (ENDS, "    return ids\n"))
slip("glue_ids", "the first token is always dropped", glue, (ENDS, "    return ids[1:]\n"))
slip("glue_ids", "the first token is dropped if the answer ended: before the end may be a space", glue,
     (ENDS, "    return ids if last_id is None else ids[1:]\n"))
slip("glue_ids", "only the first token is compared with last_id", glue,
     (ENDS, "    return ids[ids[:1] == [last_id]:]\n"))
slip("glue_ids", "the end of turn is looked for anywhere", glue,
     (ENDS, "    return ids[ids.index(last_id) + 1:] if last_id in ids else ids\n"))
slip("glue_ids", "the last turn's end is taken off, where earlier turns end otherwise", glue,
     ("len(between)", "len(last)"))
slip("glue_ids", "what was said is not compared: the next role's mark is lost", glue,
     (" or not last and between[-1:] != [last_id]", ""))
slip("glue_ids", "the header is left out", glue, (" + form.header", ""))
MARKED = """    text = chat_text(tok, [*messages[:-2], {"role": "assistant", "content": MARK}, messages[-1]],
                     add_generation_prompt=True).rpartition(MARK)[2] + form.header
"""
BEHIND = """    text = around_answer(tok, messages)[1] + form.header
"""
slip("glue_ids", "earlier answers are rendered as they were said, which a template may refuse", glue,
     (BEHIND, MARKED))
slip("glue_ids", "no assistant: at the end", glue, (BEHIND, MARKED.replace("True", "False")))
slip("glue_ids", "the first mark is taken, which the model may have said before", glue,
     (BEHIND, MARKED.replace("rpartition", "partition")))
slip("glue_ids", "the answer is looked for in the text: feedback may hold it too", glue,
     (BEHIND, """    text = chat_text(tok, messages, add_generation_prompt=True)
    text = text.rpartition(messages[-2]["content"])[2] + form.header
"""))
slip("glue_ids", "the earlier messages are dropped: a template may insist on the first role", glue,
     ("around_answer(tok, messages)", "around_answer(tok, messages[-2:])"))
slip("glue_ids", "the mark is written into the caller's messages", glue,
     ("    form =", "    messages[-2]['content'] = MARK\n    form ="))
slip("glue_ids", "leading space is stripped", glue, ("tok(text,", "tok(text.strip(),"))
slip("glue_ids", "the tokenizer's own marks, such as a first token of each text, come into the glue", glue,
     ("tok(text, add_special_tokens=False)", "tok(text)"))
slip("glue_ids", "a header of blanks is written too: the model says it", glue,
     ("form.header", "form.blank + form.header"))
slip("glue_ids", "an end token with id 0 is taken for none", glue, ("last_id is None", "not last_id"))
slip("glue_ids", "all up to the tokenizer's end token is taken off, wherever it is", glue,
     ("ids[len(between):]",
      "ids[ids.index(tok.eos_token_id) + 1:] if tok.eos_token_id in ids else ids[len(between):]"))
slip("glue_ids", "all up to the last token that was said is taken off, wherever it is", glue,
     ("ids[len(between):]", "ids[ids.index(last_id) + 1:] if last_id in ids else ids[len(between):]"))
slip("glue_ids", "a token is dropped where nothing ends a turn", glue,
     ("not last and between[-1:] != [last_id]", "not last and between and between[-1:] != [last_id]"),
     ("ids[len(between):]", "ids[len(between or [0]):]"))
slip("glue_ids", "one token is always dropped where the conversation's last turn has no end", glue,
     (" or not last and between[-1:] != [last_id]", ""),
     ("ids[len(between):]", "ids[len(between) if last else 1:]"))
slip("glue_ids", "between is one token, it is thought: before the next role's mark may be a newline", glue,
     ("between[-1:] != [last_id]", "between != [last_id]"))
slip("glue_ids", "turn_form()'s list is emptied, and it is kept for later calls", glue,
     ("    return ids[len(between):]\n", """    while between:
        between.pop()
        ids = ids[1:]
    return ids
"""))


@wrong("glue_ids", "a bare end token: the template's newline behind it is forgotten")
def _(tok, messages, last_id=None):
    text = f"<|user|>{messages[-1]['content']}<|end|><|assistant|>"
    ids = tok(text, add_special_tokens=False).input_ids
    return ids if last_id == tok.eos_token_id else [tok.eos_token_id] + ids


@right("forward", "shifted by slices")
def run_model(model, segments, pad_id, machine, **options):
    inputs, action = collate(segments, pad_id, machine.device)
    with machine.amp():
        out = model(**inputs, **options)
    keep = torch.cat([action[:, 1:], torch.zeros_like(action[:, :1])], 1)
    said = inputs["input_ids"].roll(-1, 1)[keep]
    return out, out.logits[keep].float(), keep, said


KEEP = "torch.cat([action[:, 1:], torch.zeros_like(action[:, :1])], 1)"
slip("forward", "token t is scored by position t, which has read it", run_model,
     (KEEP, "action"), (".roll(-1, 1)", ""))
slip("forward", "the mask of the position and not of the token that it scores", run_model,
     (KEEP, "torch.cat([action[:, :-1], torch.zeros_like(action[:, :1])], 1)"))
slip("forward", "all tokens are scored, the prompt's too", run_model,
     (KEEP, KEEP.replace("action", 'inputs["attention_mask"].bool()')))
slip("forward", "tokens with the id of padding are left out: here that id also ends a turn", run_model,
     (KEEP, KEEP.replace("action[:, 1:]", '(action & (inputs["input_ids"] != pad_id))[:, 1:]')))
slip("forward", "rolled around: a row's last position would score its first token", run_model,
     (KEEP, "action.roll(1, 1)"))
slip("forward", "the options are left out", run_model, (", **options)\n    keep", ")\n    keep"))
slip("forward", "the logits stay in bf16", run_model, (".float()", ""))
slip("forward", "the model does not run inside machine.amp()", run_model, ("with machine.amp():", "if True:"))
slip("forward", "the pictures do not reach the model", run_model,
     ("model(**inputs,", 'model(inputs["input_ids"], attention_mask=inputs["attention_mask"],'))
slip("forward", "the attention mask does not reach the model", run_model,
     ("model(**inputs,", 'model(**{name: x for name, x in inputs.items() if name != "attention_mask"},'))
slip("forward", "no gradient", run_model, ("with machine.amp():", "with torch.no_grad(), machine.amp():"))


@right("score", "the entropy by softmax()")
def scores(model, segments, pad_id, machine, temperature=1.0, value_head=None, entropy_grad=True):
    out, logits, keep, said = forward(model, segments, pad_id, machine, output_hidden_states=True)
    logits = logits / temperature
    for token in model.generation_config.suppress_tokens or []:
        logits = logits.index_fill(1, torch.tensor([token]), -1e9)
    logprobs = logits.log_softmax(-1)
    entropy = -(logits.softmax(-1) * logprobs).sum(-1)
    if not entropy_grad:
        entropy = entropy.detach()
    value = None
    if value_head is not None:
        value = value_head(out.hidden_states[-1][keep].float()).squeeze(-1)
    return logprobs[range(len(said)), said], entropy, value


slip("score", "the temperature is left out", scores, ("    logits = logits / temperature\n", ""))
slip("score", "multiplied by the temperature", scores, ("logits / temperature", "logits * temperature"))
slip("score", "the value is read behind the token, which it then knows", scores,
     ("[-1][keep]", "[-1][keep.roll(1, 1)]"))
slip("score", "the value is read before the last layer", scores, ("[-1][keep]", "[-2][keep]"))
slip("score", "the value of hidden states in bf16 is not in fp32", scores,
     ("value = value_head(out.hidden_states[-1][keep].float())",
      "value = value_head.to(out.hidden_states[-1].dtype)(out.hidden_states[-1][keep])"))
slip("score", "tokens that rollout() never samples keep their probability", scores,
     ("suppress_tokens or []", "bad_words_ids or []"))
slip("score", "minus infinity in place of -1e9: the entropy is NaN", scores, ("-1e9", "-math.inf"))
slip("score", "the sign of the entropy", scores, ("-(logits", "(logits"))
slip("score", "the entropy's gradient is always there", scores, ("if not entropy_grad", "if False"))
slip("score", "the entropy never has a gradient", scores, ("if not entropy_grad", "if True"))


@wrong("sft_loss", "the mean over all tokens, the prompt's too")
def _(model, rows, denominator, pad_id, machine):
    losses = [model(torch.tensor([r.ids]), labels=torch.tensor([r.ids])).loss for r in rows]
    return torch.stack(losses).mean()


@right("sft_loss", "by cross_entropy()")
def nll(model, rows, denominator, pad_id, machine):
    _, logits, _, said = forward(model, rows, pad_id, machine)
    return torch.nn.functional.cross_entropy(logits, said, reduction="sum") / denominator


slip("sft_loss", "the mean over this batch: the denominator is not used", nll,
     (', reduction="sum") / denominator', ")"))
slip("sft_loss", "the mean, and divided once more", nll, (', reduction="sum"', ""))
slip("sft_loss", "tokens with the id of padding carry no loss: here that id also ends a turn", nll,
     ("said, reduction", "said, ignore_index=pad_id, reduction"))
slip("sft_loss", "the sign: likely answers would be made unlikely", nll, ("return torch", "return -torch"))


@wrong("sft_loss", "not shifted: position t is asked for token t, which it has read")
def _(model, rows, denominator, pad_id, machine):
    total = 0.0
    for r in rows:
        keep = torch.tensor(r.action_mask).bool()
        logits = model(torch.tensor([r.ids])).logits[0]
        total += torch.nn.functional.cross_entropy(logits[keep], torch.tensor(r.ids)[keep], reduction="sum")
    return total / denominator


@right("dft_loss", "by the losses")
def weighted(model, rows, denominator, pad_id, machine):
    _, logits, _, said = forward(model, rows, pad_id, machine)
    losses = torch.nn.functional.cross_entropy(logits, said, reduction="none")
    return (losses * (-losses).exp().detach()).sum() / denominator


slip("dft_loss", "the weight is not a constant: it has a gradient of its own", weighted, (".detach()", ""))
slip("dft_loss", "divided by the probability, as importance sampling would", weighted,
     ("(-losses)", "losses"))
slip("dft_loss", "one weight for all tokens, their mean probability", weighted,
     (".detach()", ".detach().mean()"))
slip("dft_loss", "plain SFT", weighted, (" * (-losses).exp().detach()", ""))


# ------------------------------------------------------------------------------------------------------------
# Sheet 3.

@right("kl_estimators", "by expm1()")
def kl(logp, ref_logp):
    k1 = logp - ref_logp
    return k1, torch.expm1(-k1) + k1


slip("kl_estimators", "the sign of k1", kl, ("return k1", "return -k1"))
slip("kl_estimators", "k3 with the ratio upside down: it estimates the other KL", kl,
     ("torch.expm1(-k1) + k1", "torch.expm1(k1) - k1"))
slip("kl_estimators", "k2, half the square, in place of k3", kl,
     ("torch.expm1(-k1) + k1", "0.5 * k1.square()"))


@right("token_rewards", "in one line")
def paid(segment, reward_scale, beta):
    verifier = torch.tensor([r for r, a in zip(segment.reward, segment.action_mask) if a])
    return verifier / reward_scale - beta * kl_estimators(segment.logp, segment.ref_logp)[0]


slip("token_rewards", "the whole penalty sits on the last token", paid,
     ("    return", "    penalty = torch.zeros_like(verifier)\n"
      "    penalty[-1] = beta * kl_estimators(segment.logp, segment.ref_logp)[0].sum()\n    return"),
     ("- beta * kl_estimators(segment.logp, segment.ref_logp)[0]\n", "- penalty\n"))
slip("token_rewards", "the penalty is paid out", paid, ("- beta", "+ beta"))
slip("token_rewards", "the penalty is scaled too", paid,
     ("verifier / reward_scale - beta", "(verifier - beta"), ("[0]", "[0]) / reward_scale"))
slip("token_rewards", "k3 in place of k1", paid, ("[0]", "[1]"))


@wrong("token_rewards", "the verifier's rewards are all put on the first tokens")
def _(segment, reward_scale, beta):
    verifier = torch.zeros(len(segment.logp))
    paid = [r for r in segment.reward if r]
    verifier[:len(paid)] = torch.tensor(paid)
    return verifier / reward_scale - beta * kl_estimators(segment.logp, segment.ref_logp)[0]


@wrong("answer_discounts", "the segment's mask grows")
def _(segment, gamma):
    mask = segment.action_mask
    mask.append(0)
    return torch.tensor([1.0 if mask[i + 1] else gamma for i in range(len(mask) - 1) if mask[i]])


@wrong("answer_discounts", "gamma behind every token")
def _(segment, gamma):
    return torch.full((sum(segment.action_mask),), gamma)


@wrong("answer_discounts", "gamma before an answer and not behind it")
def _(segment, gamma):
    before = [0] + segment.action_mask[:-1]
    return torch.tensor([1.0 if prior else gamma for now, prior in zip(segment.action_mask, before) if now])


@wrong("answer_discounts", "no discount behind the segment's last answer")
def _(segment, gamma):
    pairs = zip(segment.action_mask, segment.action_mask[1:] + [1])
    return torch.tensor([1.0 if after else gamma for now, after in pairs if now])


@wrong("answer_discounts", "gamma only behind the segment's last answer")
def _(segment, gamma):
    return torch.tensor([1.0] * (sum(segment.action_mask) - 1) + [gamma])


@right("gae", "a loop over tensors")
def backwards(rewards, values, discounts, lam):
    advantages, next_value, next_advantage = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + discounts[t] * next_value - values[t]
        next_advantage = delta + discounts[t] * lam * next_advantage
        advantages[t], next_value = next_advantage, values[t]
    return advantages, advantages + values


slip("gae", "the sign of the value", backwards,
     ("+ discounts[t] * next_value - values", "- discounts[t] * next_value + values"))
slip("gae", "only the advantages are returned", backwards, (", advantages + values", ""))
slip("gae", "off by one: the discount behind the token before", backwards,
     ("        delta =", "        discount = discounts[t - 1] if t else 1.0\n        delta ="),
     ("discounts[t] * next", "discount * next"), ("discounts[t] * lam", "discount * lam"))
slip("gae", "the end leaks: behind the last token comes the value of the first, as if of a next episode",
     backwards, ("zeros_like(values), 0.0, 0.0", "zeros_like(values), values[0], 0.0"))
slip("gae", "the discount is missing in the recursion: only lambda is there", backwards,
     ("discounts[t] * lam", "lam"))
slip("gae", "returns are sums of rewards: right only at lambda 1", backwards,
     ("    for t", "    total, returns = 0.0, torch.zeros_like(values)\n    for t"),
     ("        delta =", """        total = rewards[t] + discounts[t] * total
        returns[t] = total
        delta ="""),
     ("advantages + values", "returns"))
slip("gae", "from the first token to the last", backwards,
     ("reversed(range(len(rewards)))", "range(len(rewards))"))


@wrong("gae", "lists in place of tensors")
def _(rewards, values, discounts, lam):
    advantages, next_value, next_advantage = [], 0.0, 0.0
    for r, v, d in reversed(list(zip(rewards.tolist(), values.tolist(), discounts.tolist()))):
        next_advantage = r + d * next_value - v + d * lam * next_advantage
        advantages, next_value = [next_advantage, *advantages], v
    return advantages, [a + v for a, v in zip(advantages, values.tolist())]


@wrong("estimate_advantages", "each conversation by itself: a later answer's reward does not reach back")
def _(episode, reward_scale, beta, gamma, lam):
    for s in episode.segments:
        rewards = token_rewards(s, reward_scale, beta)
        s.advantage, s.returns = gae(rewards, s.value, answer_discounts(s, gamma), lam)


@right("estimate_advantages", "by joined() and split_back()")
def estimate(episode, reward_scale, beta, gamma, lam):
    segments = episode.segments
    rewards = torch.cat([token_rewards(s, reward_scale, beta) for s in segments])
    discounts = torch.cat([answer_discounts(s, gamma) for s in segments])
    advantage, returns = gae(rewards, joined(segments, "value"), discounts, lam)
    split_back(segments, advantage=advantage, returns=returns)


slip("estimate_advantages", "gamma and lambda are swapped", estimate,
     ("answer_discounts(s, gamma)", "answer_discounts(s, lam)"), ("discounts, lam)", "discounts, gamma)"))
slip("estimate_advantages", "conversations are joined from the last to the first", estimate,
     ("episode.segments", "episode.segments[::-1]"))
slip("estimate_advantages", "advantages and returns are swapped", estimate,
     ("advantage, returns =", "returns, advantage ="))


@wrong("estimate_advantages", "only the last conversation")
def _(episode, reward_scale, beta, gamma, lam):
    s = episode.segments[-1]
    rewards = token_rewards(s, reward_scale, beta)
    s.advantage, s.returns = gae(rewards, s.value, answer_discounts(s, gamma), lam)


@wrong("whiten", "each rank by itself")
def _(x, machine):
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-8).sqrt()


@wrong("whiten", "the mean of the ranks' means: ranks have unequally many tokens")
def _(x, machine):
    mean = all_sum([x.mean().item()], machine)[0] / machine.world
    variance = all_sum([(x - mean).square().mean().item()], machine)[0] / machine.world
    return (x - mean) / math.sqrt(variance + 1e-8)


@right("whiten", "two sums over the ranks")
def scaled(x, machine):
    total, count = all_sum([x.double().sum().item(), x.numel()], machine)
    variance = all_sum([(x.double() - total / count).square().sum().item()], machine)[0] / count
    return (x - total / count) / math.sqrt(variance + 1e-8)


slip("whiten", "divided by the variance", scaled, ("math.sqrt(variance + 1e-8)", "(variance + 1e-8)"))
slip("whiten", "no small number under the root: equal advantages give NaN", scaled,
     ("math.sqrt(variance + 1e-8)", "torch.tensor(variance).sqrt()"))
slip("whiten", "the mean stays", scaled, ("return (x - total / count)", "return x"))


@right("policy_loss", "the maximum of the losses")
def surrogate(logp, old_logp, advantages, clip):
    ratio = (logp - old_logp).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


slip("policy_loss", "no clip", surrogate, ("ratio.clamp(1 - clip, 1 + clip)", "ratio"))
slip("policy_loss", "only the clipped term: a bad step is not taken back", surrogate,
     ("torch.max(-advantages * ratio, ", "("))
slip("policy_loss", "the better of both in place of the worse", surrogate, ("torch.max", "torch.min"))
slip("policy_loss", "not negated: the optimizer would make good tokens unlikely", surrogate,
     ("return", "return -"))
slip("policy_loss", "the ratio upside down", surrogate, ("logp - old_logp", "old_logp - logp"))


@right("value_loss", "the larger square")
def worse(values, old_values, returns, clip):
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


slip("value_loss", "no clip", worse, ("(clipped - returns)", "(values - returns)"))
slip("value_loss", "the better of both in place of the worse", worse, ("torch.max", "torch.min"))
slip("value_loss", "the gradient goes on where the clipped value is the worse one", worse,
     ("old_values + (values - old_values).clamp(-clip, clip)",
      "values + ((values - old_values).clamp(-clip, clip) + old_values - values).detach()"))
slip("value_loss", "the half is missing", worse, ("0.5 * ", ""))
slip("value_loss", "clipped near the return and not near the old value", worse,
     ("old_values + (values - old_values)", "returns + (values - returns)"))
slip("value_loss", "the mean of all tokens: train() divides by its own count", worse,
     (".square())", ".square()).mean()"))


@right("update", "epochs and minibatches nested, the step without clip_and_step()")
def update():
    done = False
    for epoch in range(args.epochs):
        order = list(segments)
        rng.shuffle(order)
        for k in range(args.minibatches):
            minibatch = order[k * len(order) // args.minibatches:(k + 1) * len(order) // args.minibatches]
            count = all_sum([sum(sum(s.action_mask) for s in minibatch)], machine)[0]
            optimizer.zero_grad()
            total = dict(policy_loss=0.0, value_loss=0.0, entropy=0.0, approx_kl=0.0, abs_log_ratio=0.0,
                         clip_fraction=0.0)
            for part, weight in micro_batches(minibatch, args.micro_tokens, machine):
                logp, entropy, value = score(policy, part, pad, machine, args.temperature, value_head)
                old = joined(part, "logp")
                actor = policy_loss(logp, old, joined(part, "whitened"), args.clip)
                critic = value_loss(value, joined(part, "value"), joined(part, "returns"), args.clip_value)
                loss = weight * (actor + args.coef_value * critic - args.coef_entropy * entropy).sum()
                scaler.scale(loss / count).backward()
                with torch.no_grad():
                    gone = (logp - old).exp() - 1
                    if updates == 0:
                        ratio_error = max(ratio_error, (logp - old).abs().max().item())
                    total["policy_loss"] += weight * actor.sum().item()
                    total["value_loss"] += weight * critic.sum().item()
                    total["entropy"] += weight * entropy.sum().item()
                    total["approx_kl"] += weight * kl_estimators(old, logp)[1].sum().item()
                    total["abs_log_ratio"] += weight * (logp - old).abs().sum().item()
                    total["clip_fraction"] += weight * (gone.abs() > args.clip).sum().item()
            trained_tokens += sum(len(s.ids) for s in minibatch)
            means = {name: x / count for name, x in zip(total, all_sum(total.values(), machine))}
            if updates == 0 and (ratio_error > 1e-3 if machine.dtype == torch.float32
                                 else means["abs_log_ratio"] > 0.05):
                fail(f"the first ratio is off by {ratio_error}")
            if means["approx_kl"] > args.target_kl:
                done = True
                break
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            if math.isfinite(norm):
                scaler.step(optimizer)
                updates += 1
                for name in means:
                    stats[name] += means[name]
                stats["grad_norm"] += norm
            elif not scaler.is_enabled():
                fail("the gradient is not finite")
            scaler.update()
        if done:
            break


slip("update", "the mean of the means of the micro-batches", update,
     ("- args.coef_entropy * entropy).sum()", "- args.coef_entropy * entropy).mean()"),
     ("loss / count", "loss / len(micro_batches(minibatch, args.micro_tokens, machine))"))
slip("update", "each micro-batch is divided by its own count", update, ("loss / count", "loss / len(logp)"))
slip("update", "the count of this rank: with FSDP the gradients of all ranks are added up", update,
     ("loss / count", "loss / sum(len(s.logp) for s in minibatch)"))
slip("update", "the tokens are counted with their prompts", update,
     ("sum(sum(s.action_mask) for s in minibatch)", "sum(len(s.ids) for s in minibatch)"))
slip("update", "the step is taken before the KL is looked at", update,
     ("""            if means["approx_kl"] > args.target_kl:
                done = True
                break
""", ""), ("            scaler.update()\n", """            scaler.update()
            if means["approx_kl"] > args.target_kl:
                done = True
                break
"""))
slip("update", "the KL stop leaves only its epoch", update, ("done = True", "done = False"))
slip("update", "no KL stop", update, ("args.target_kl", "1e9"))
slip("update", "the KL of pi_old from pi in place of pi from pi_old", update,
     ("kl_estimators(old, logp)", "kl_estimators(logp, old)"))
slip("update", "gradients are never set to zero", update, ("            optimizer.zero_grad()\n", ""))
slip("update", "the sign of the entropy bonus", update, ("- args.coef_entropy", "+ args.coef_entropy"))
slip("update", "the critic's weight is on the policy", update,
     ("(actor + args.coef_value * critic", "(args.coef_value * actor + critic"))
slip("update", "the gradient's norm is not clipped", update, ("(parameters, 1.0)", "(parameters, 1e9)"))
slip("update", "the gradient always has norm 1", update,
     ("            if math.isfinite(norm):", """            for p in parameters:
                p.grad /= norm if math.isfinite(norm) and norm < 1 else 1
            if math.isfinite(norm):"""))
slip("update", "the value head is left out of the clip", update,
     ("(parameters, 1.0)", "(policy.parameters(), 1.0)"))
slip("update", "clipped first and unscaled after that", update,
     ("            scaler.unscale_(optimizer)\n", ""),
     ("            if math.isfinite(norm):", """            scaler.unscale_(optimizer)
            if math.isfinite(norm):"""))
slip("update", "the loss is not scaled", update, ("scaler.scale(loss / count)", "(loss / count)"))
slip("update", "the loss scaler is not updated", update, ("            scaler.update()\n", ""))
slip("update", "a step on a gradient that is not finite", update,
     ("math.isfinite(norm)", "True"), ("scaler.step(optimizer)", "optimizer.step()"))
slip("update", "a skipped step is counted and logged", update,
     ("if math.isfinite(norm):", "if True:"),
     ("                scaler.step(", "                norm < 1e9 and scaler.step("))
slip("update", "old log-probs are scored anew: the ratio is always 1", update,
     ('old = joined(part, "logp")', "old = logp.detach()"))
slip("update", "the temperature is left out", update,
     ("machine, args.temperature, value_head", "machine, 1.0, value_head"))
slip("update", "advantages that are not whitened", update, ('"whitened"', '"advantage"'))
slip("update", "old values and returns are swapped", update,
     ('joined(part, "value"), joined(part, "returns")', 'joined(part, "returns"), joined(part, "value")'))
slip("update", "train mode: dropout is on", update,
     ("    done = False\n", "    done = False\n    policy.train()\n"))
slip("update", "no gradient through the entropy", update,
     ("args.temperature, value_head)", "args.temperature, value_head, False)"))
slip("update", "one forward pass for the whole minibatch", update, ("args.micro_tokens", "10 ** 9"))
slip("update", "the weight of a repeated micro-batch is left out of the loss", update,
     ("loss = weight * (", "loss = ("))
slip("update", "the weight of a repeated micro-batch is left out of the log", update,
     ('total["approx_kl"] += weight *', 'total["approx_kl"] +='))
slip("update", "the same minibatches in each epoch", update, ("        rng.shuffle(order)\n", ""))
slip("update", "shuffled by the global generator: a resumed run would differ", update,
     ("rng.shuffle", "random.shuffle"))
slip("update", "minibatches overlap", update, ("(k + 1) * len(order) // args.minibatches", "len(order)"))
slip("update", "only the first epoch", update, ("range(args.epochs)", "range(1)"))
slip("update", "the clip fraction counts only ratios above 1 + eps", update, ("gone.abs()", "gone"))
slip("update", "the log has the last minibatch's means only", update, ("stats[name] += ", "stats[name] = "))
slip("update", "the log has sums over this rank's tokens and not means", update,
     ("x / count for name", "x for name"))
slip("update", "ratio_error is not measured", update, ("if updates == 0:", "if False:"))
slip("update", "ratio_error goes on after the first step", update, ("if updates == 0:", "if True:"))
slip("update", "the run goes on where the first ratio is not 1", update,
     ("ratio_error > 1e-3", "ratio_error > 1e9"))
slip("update", "trained_tokens counts the action tokens only", update,
     ("trained_tokens += sum(len(s.ids)", "trained_tokens += sum(len(s.logp)"))

for reason, *changes in (
        ("the reference's log-probs in place of the old ones",
         ('joined(part, "logp")', 'joined(part, "ref_logp")')),
        ("the KL from the reference in place of from the old policy",
         ("kl_estimators(old, logp)", 'kl_estimators(joined(part, "ref_logp"), logp)')),
        ("ratio_error from the reference",
         ("max(ratio_error, (logp - old)", 'max(ratio_error, (logp - joined(part, "ref_logp"))')),
        ("the clip fraction from the reference",
         ("gone = (logp - old)", 'gone = (logp - joined(part, "ref_logp"))'))):
    slip("update", reason, update, *changes)
SLICE = "order[k * len(order) // args.minibatches:(k + 1) * len(order) // args.minibatches]"
slip("update", "the rest of the conversations is dropped where their number is no multiple", update,
     (SLICE, "order[k * (len(order) // args.minibatches):(k + 1) * (len(order) // args.minibatches)]"))
for reason, size in (("rounded down, so there are more minibatches",
                      "max(1, len(order) // args.minibatches)"),
                     ("rounded up, so there are fewer minibatches", "-(-len(order) // args.minibatches)")):
    slip("update", "a minibatch's size is " + reason, update,
         ("for k in range(args.minibatches)", f"for k in range(0, len(order), {size})"),
         (SLICE, f"order[k:k + {size}]"))
slip("update", "ratio_error is of all steps, though the run stops only before the first", update,
     ("if updates == 0:\n", "if True:\n"))
slip("update", "ratio_error is that of the last micro-batch", update,
     ("max(ratio_error, (logp - old).abs().max().item())", "(logp - old).abs().max().item()"))
slip("update", "ratio_error is that of the first micro-batch", update,
     ("max(ratio_error, (logp - old).abs().max().item())", "ratio_error or (logp - old).abs().max().item()"))
slip("update", "ratio_error has a sign", update, ("(logp - old).abs().max()", "(logp - old).max()"))
slip("update", "ratio_error is added up over the ranks", update,
     ("            trained_tokens +=",
      "            ratio_error = all_sum([ratio_error], machine)[0]\n            trained_tokens +="))
STOP = """(ratio_error > 1e-3 if machine.dtype == torch.float32
                                 else means["abs_log_ratio"] > 0.05)"""
slip("update", "fp32's bound of the first ratio in every dtype", update, (STOP, "ratio_error > 1e-3"))
slip("update", "only fp32 has a bound", update,
     (STOP, "machine.dtype == torch.float32 and ratio_error > 1e-3"))
slip("update", "a bound for fp32 and bf16, none for fp16", update,
     (STOP, STOP + " and not scaler.is_enabled()"))
slip("update", "the other bound is of the largest log ratio and not of the mean", update,
     ('means["abs_log_ratio"] > 0.05', "ratio_error > 0.05"))
slip("update", "the mean log ratio with its sign: ups and downs cancel", update,
     ('weight * (logp - old).abs().sum()', "weight * (logp - old).sum()"))
slip("update", "the mean |log ratio| is not logged", update,
     ("for name in means:\n", "for name in set(means) - {'abs_log_ratio'}:\n"))
slip("update", "the KL stop comes before the test of the first ratio", update,
     ("            if updates == 0 and (", """            if means["approx_kl"] > args.target_kl:
                done = True
                break
            if updates == 0 and ("""))
slip("update", "a micro-batch with weight 0 is not run: FSDP2 hangs", update,
     ("                logp, entropy, value = score(", """                if weight == 0:
                    continue
                logp, entropy, value = score("""))
slip("update", "a micro-batch with weight 0 has no backward pass: FSDP2 hangs", update,
     ("                scaler.scale(loss / count)", "                weight and scaler.scale(loss / count)"))
slip("update", "the KL stop asks this rank's sum over all ranks' tokens", update,
     ('means["approx_kl"] > args.target_kl', 'total["approx_kl"] / count > args.target_kl'))
slip("update", "the KL stop asks this rank's mean", update, (
    'means["approx_kl"] > args.target_kl',
    'total["approx_kl"] / sum(len(s.logp) for s in minibatch) > args.target_kl'))
slip("update", "the log has this rank's means", update,
     ("all_sum(total.values(), machine)",
      "[y * count / sum(len(s.logp) for s in minibatch) for y in total.values()]"))
slip("update", "trained_tokens are added up over the ranks, and train() does that once more", update,
     ("trained_tokens += sum(len(s.ids) for s in minibatch)",
      "trained_tokens += int(all_sum([sum(len(s.ids) for s in minibatch)], machine)[0])"))
slip("update", "a minibatch at which the KL stop ends the update is not in trained_tokens", update,
     ("            trained_tokens += sum(len(s.ids) for s in minibatch)\n", ""),
     ("            scaler.unscale_",
      "            trained_tokens += sum(len(s.ids) for s in minibatch)\n            scaler.unscale_"))
slip("update", "a micro-batch with weight 0 is counted among the tokens", update,
     ("all_sum([sum(sum(s.action_mask) for s in minibatch)], machine)[0]",
      "all_sum([sum(sum(s.action_mask) for part, _ in micro_batches(minibatch, args.micro_tokens, machine) "
      "for s in part)], machine)[0]"))
slip("update", "a minibatch at which the KL stop ends the update is in the stats", update,
     ("""                for name in means:
                    stats[name] += means[name]
""", ""),
     ("            if means[\"approx_kl\"] >", """            for name in means:
                stats[name] += means[name]
            if means["approx_kl"] >"""))
slip("update", "an fp16 gradient that is not finite ends the update", update,
     ("            scaler.update()\n", """            scaler.update()
            if not math.isfinite(norm):
                done = True
                break
"""))
slip("update", "gradients are set to zero once an epoch", update,
     ("            optimizer.zero_grad()\n", ""),
     ("        rng.shuffle(order)\n", "        rng.shuffle(order)\n        optimizer.zero_grad()\n"))
slip("update", "the clip fraction by the log ratio", update, ("gone.abs() >", "(logp - old).abs() >"))
slip("update", "the critic's old values are the new ones: its clip never acts", update,
     ('joined(part, "value"), joined', "value.detach(), joined"))
slip("update", "grad_norm is the norm after clipping", update,
     ('stats["grad_norm"] += norm', 'stats["grad_norm"] += min(norm, 1.0)'))
slip("update", "the policy's weight is missing where the critic has one", update,
     ("(actor + args.coef_value * critic", "((1 - args.coef_value) * actor + args.coef_value * critic"))


@wrong("group_baseline", "the mean of the whole batch")
def _(rewards, groups):
    return rewards - rewards.mean()


@wrong("group_baseline", "it assumes that groups are contiguous and equally large")
def _(rewards, groups):
    count = len(set(groups.tolist()))
    rows = rewards.reshape(count, -1)
    return (rows - rows.mean(1, keepdim=True)).flatten()


@wrong("group_baseline", "the sign")
def _(rewards, groups):
    return torch.stack([rewards[groups == g].mean() for g in groups]) - rewards


@wrong("group_baseline", "the mean of the other episodes: a group of one has none")
def _(rewards, groups):
    same = (groups[:, None] == groups[None, :]).float()
    return rewards - (same @ rewards - rewards) / (same.sum(1) - 1)


# ------------------------------------------------------------------------------------------------------------
# Right answers that differ from the repository's: a test must not demand one way.

@right("solutions", "looked up, without the shortcut")
def _(numbers, target=24):
    return tuple(sorted(map(write, reachable(numbers).get(Fraction(target), ())), key=lambda s: (len(s), s)))


@right("relative_word", "by cases")
def _(old, new):
    turn = (new - old) % 360
    if turn <= 45:
        return "slightly right"
    return "right" if turn < 180 else "left" if turn < 315 else "slightly left"


@right("Segment.add", "token by token")
def _(self, ids, action):
    self.ids = list(self.ids)
    self.ids.extend(ids)
    while len(self.action_mask) < len(self.ids):
        self.action_mask.append(action)
    while len(self.reward) < len(self.ids):
        self.reward.append(0.0)


@right("forward", "row by row, without padding")
def _(model, segments, pad_id, machine, **options):
    inputs, _ = collate(segments, pad_id, machine.device)
    with machine.amp():
        out = model(**inputs, **options)
    keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    said = []
    for row, segment in enumerate(segments):
        for t, action in enumerate(segment.action_mask):
            if action:
                keep[row, t - 1] = True
                said.append(segment.ids[t])
    return out, out.logits[keep].float(), keep, torch.tensor(said)


@right("score", "without forward()")
def _(model, segments, pad_id, machine, temperature=1.0, value_head=None, entropy_grad=True):
    inputs, action = collate(segments, pad_id, machine.device)
    out = model(**inputs, output_hidden_states=True)
    keep = action[:, 1:]
    logits = out.logits[:, :-1][keep].float() / temperature
    for token in model.generation_config.suppress_tokens or []:
        logits[:, token] = -1e9
    spread = torch.distributions.Categorical(logits=logits)
    entropy = spread.entropy() if entropy_grad else spread.entropy().detach()
    value = None if value_head is None else value_head(out.hidden_states[-1][:, :-1][keep]).squeeze(-1)
    return spread.log_prob(inputs["input_ids"][:, 1:][keep]), entropy, value


@right("sft_loss", "without forward()")
def _(model, rows, denominator, pad_id, machine):
    from eval import collate
    inputs, action = collate(rows, pad_id, machine.device)
    logp = model(**inputs).logits[:, :-1].float().log_softmax(-1)
    logp = logp.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return -(logp * action[:, 1:]).sum() / denominator


@right("dft_loss", "under no_grad, keywords in place of positions")
def _(model, rows, denominator, pad_id, machine):
    _, logits, _, said = forward(model=model, segments=rows, pad_id=pad_id, machine=machine)
    logp = logits.log_softmax(-1).gather(-1, said[:, None])[:, 0]
    with torch.no_grad():
        p = logp.exp()
    return -(p * logp).sum() / denominator


@right("kl_estimators", "by the ratio")
def _(logp, ref_logp):
    ratio = (ref_logp - logp).exp()
    return -ratio.log(), ratio - 1 - ratio.log()


@right("token_rewards", "from zeros")
def _(segment, reward_scale, beta):
    rewards, at = -beta * (segment.logp - segment.ref_logp), 0
    for paid, action in zip(segment.reward, segment.action_mask):
        if action:
            rewards[at] += paid / reward_scale
            at += 1
    return rewards


@right("answer_discounts", "by a mask")
def _(segment, gamma):
    action = torch.tensor(segment.action_mask + [0]).bool()
    return torch.where(action[1:], 1.0, gamma)[action[:-1]]


@right("gae", "the double sum of the definition")
def _(rewards, values, discounts, lam):
    n, behind = len(rewards), torch.cat([values[1:], values.new_zeros(1)])
    delta, advantages = rewards + discounts * behind - values, []
    for t in range(n):
        advantages.append(sum(lam ** (k - t) * discounts[t:k].prod() * delta[k] for k in range(t, n)))
    return torch.stack(advantages), torch.stack(advantages) + values


@right("estimate_advantages", "cut by hand, keywords in place of positions")
def _(episode, reward_scale, beta, gamma, lam):
    parts = episode.segments
    advantage, returns = gae(
        rewards=torch.cat([token_rewards(s, reward_scale=reward_scale, beta=beta) for s in parts]),
        values=torch.cat([s.value for s in parts]),
        discounts=torch.cat([answer_discounts(s, gamma=gamma) for s in parts]), lam=lam)
    at = 0
    for s in parts:
        s.advantage, s.returns = advantage[at:at + len(s.value)], returns[at:at + len(s.value)]
        at += len(s.value)


@right("whiten", "one sum over the ranks: the mean of squares less the square of the mean")
def _(x, machine):
    total, squares, n = all_sum(values=[x.sum().item(), x.square().sum().item(), len(x)], machine=machine)
    variance = max(0.0, squares / n - (total / n) ** 2)
    return (x - total / n) / (variance + 1e-8) ** 0.5


@right("policy_loss", "the surrogate's minimum, negated")
def _(logp, old_logp, advantages, clip):
    ratio = torch.exp(logp - old_logp)
    return -torch.minimum(ratio * advantages, torch.clip(ratio, 1 - clip, 1 + clip) * advantages)


@right("value_loss", "the larger distance, squared")
def _(values, old_values, returns, clip):
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return torch.maximum((values - returns).abs(), (clipped - returns).abs()) ** 2 / 2


@right("update", "the loss is a mean of means with shares; log-probs are kept in lists")
def _():
    epochs = [rng.sample(segments, len(segments)) for _ in range(args.epochs)]
    cuts = [e[len(e) * m // args.minibatches:len(e) * (m + 1) // args.minibatches]
            for e in epochs for m in range(args.minibatches)]
    for chosen in cuts:
        policy.zero_grad()
        value_head.zero_grad()
        [everywhere] = all_sum([sum(s.logp.numel() for s in chosen)], machine)
        names = ["policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "abs_log_ratio"]
        sums = torch.zeros(6, dtype=torch.float64)
        for part, weight in micro_batches(chosen, args.micro_tokens, machine):
            new, entropy, value = score(policy, part, pad, machine, temperature=args.temperature,
                                        value_head=value_head, entropy_grad=True)
            old, whitened, was, returns = (joined(part, x) for x in ("logp", "whitened", "value", "returns"))
            share = weight * len(old) / everywhere
            actor = policy_loss(new, old, whitened, args.clip)
            critic = value_loss(value, was, returns, args.clip_value)
            loss = actor.mean() + args.coef_value * critic.mean() - args.coef_entropy * entropy.mean()
            scaler.scale(loss * share).backward()
            ratio = (new.detach() - old).exp()
            outside = (ratio > 1 + args.clip) | (ratio < 1 - args.clip)
            k3 = kl_estimators(old, new.detach())[1]
            found = actor, critic, entropy, k3, outside, ratio.log().abs()
            sums += weight * torch.stack([x.detach().double().sum() for x in found])
            if not updates:
                ratio_error = max(ratio_error, float(ratio.log().abs().max()))
        trained_tokens += sum(map(len, (s.ids for s in chosen)))
        found = dict(zip(names, [x / everywhere for x in all_sum(sums.tolist(), machine)]))
        if machine.dtype == torch.float32:
            assert ratio_error < 1e-3 or fail("not repeatable")
        else:
            assert updates or found["abs_log_ratio"] <= 0.05 or fail("not repeatable on the mean")
        if found["approx_kl"] > args.target_kl:
            break
        found["grad_norm"] = clip_and_step(parameters, [optimizer], scaler, "update")
        if found["grad_norm"] < math.inf:
            updates += 1
            for name, x in found.items():
                stats[name] = stats.get(name, 0) + x


@right("update", "a function for a minibatch; the KL is measured in a pass of its own, before the gradient")
def _():
    def parts_of(minibatch):
        for part, weight in micro_batches(minibatch, args.micro_tokens, machine):
            logp, entropy, value = score(policy, part, pad, machine, args.temperature, value_head)
            yield part, weight, logp, entropy, value

    def measure(minibatch):
        kl, outside, off, mean = 0.0, 0.0, 0.0, 0.0
        with torch.no_grad():
            for part, weight, logp, _, _ in parts_of(minibatch):
                change = logp - joined(part, "logp")
                kl += weight * kl_estimators(joined(part, "logp"), logp)[1].sum().item()
                outside += weight * ((change.exp() - 1).abs() > args.clip).sum().item()
                off = max(off, change.abs().max().item())
                mean += weight * change.abs().sum().item()
        kl, outside, mean, count = all_sum([kl, outside, mean, sum(len(s.value) for s in minibatch)], machine)
        return kl / count, outside / count, off, mean / count, count

    queue = []
    for _ in range(args.epochs):
        order = sorted(segments, key=lambda s: rng.random())
        queue += [order[m::args.minibatches] for m in range(args.minibatches)]
    while queue:
        minibatch = queue.pop(0)
        trained_tokens += sum(len(s.ids) for s in minibatch)
        kl, outside, off, mean, count = measure(minibatch)
        if updates == 0:
            ratio_error = max(off, ratio_error)
            if off > 1e-3 and machine.dtype == torch.float32 or mean > 0.05:
                raise SystemExit("the first ratio is not 1")
        if kl > args.target_kl:
            queue = []
            continue
        sums = [0.0, 0.0, 0.0]
        for part, weight, logp, entropy, value in parts_of(minibatch):
            terms = [policy_loss(logp, joined(part, "logp"), joined(part, "whitened"), args.clip),
                     value_loss(value, joined(part, "value"), joined(part, "returns"), args.clip_value),
                     entropy]
            terms = [weight * x.sum() for x in terms]
            loss = terms[0] + args.coef_value * terms[1] - args.coef_entropy * terms[2]
            scaler.scale(loss).backward()
            sums = [a + b.item() for a, b in zip(sums, terms)]
        for p in parameters:
            p.grad /= count
        norm = clip_and_step(parameters, [optimizer], scaler, "")
        optimizer.zero_grad()
        if not math.isfinite(norm):
            continue
        updates += 1
        pl, vl, ent = (x / count for x in all_sum(sums, machine))
        stats.update(policy_loss=pl, value_loss=vl, entropy=ent, approx_kl=kl, clip_fraction=outside,
                     abs_log_ratio=mean, grad_norm=norm)


@right("group_baseline", "group by group")
def _(rewards, groups):
    out = rewards.clone()
    for g in groups.unique():
        out[groups == g] -= rewards[groups == g].mean()
    return out


# ------------------------------------------------------------------------------------------------------------
# The tests.

def module_of(exercise):
    return importlib.import_module(exercise.file.removesuffix(".py"))


@contextlib.contextmanager
def put(exercise, function):
    """Inside the block the exercise's function is this one, with the global names of its module. Where the
    exercise is a block of a function, that function is compiled with this one's body."""
    module, made = module_of(exercise), {}
    *owner, name = exercise.name.split(".")
    if exercise.block:
        lines, tree = make.read(os.path.join(ROOT, exercise.file))
        start, end = make.span(tree, lines, exercise)
        name, first = exercise.block[0], make.find(tree, exercise.block[0]).lineno - 1
        inside = textwrap.dedent(function.partition("\n")[2] if isinstance(function, str) else body(function))
        text = "".join(lines[first:start]) + textwrap.indent(inside, " " * 8) + "".join(lines[end:])
        exec(text[:text.index("\n\n\n")], vars(module), made)
        new = made[name]
    elif isinstance(function, str):
        exec(function, vars(module), made)
        new = made["_"]
    else:
        new = types.FunctionType(function.__code__, vars(module), name, function.__defaults__)
    with mock.patch.object(getattr(module, owner[0]) if owner else module, name, new, create=exercise.added):
        yield


def solved(exercise):
    """Inside the block the exercise is solved: an addition is put where a student would add it."""
    return put(exercise, getattr(additions, exercise.name)) if exercise.added else contextlib.nullcontext()


def verdict_on(exercise):
    try:
        exercise.test(module_of(exercise))
    except BaseException as error:
        return complaint(error, "test_class.py")
    return "passed"


def test_solutions_pass():
    for e in EXERCISES.values():
        with solved(e):
            assert verdict_on(e) == "passed", f"{e.name}: {verdict_on(e)}"


def test_other_right_answers_pass():
    for name, way, function in RIGHT:
        with put(EXERCISES[name], function):
            assert verdict_on(EXERCISES[name]) == "passed", f"{name}, {way}: {verdict_on(EXERCISES[name])}"


def test_every_wrong_answer_fails():
    for name in EXERCISES:
        assert sum(name == of for of, _, _ in WRONG) >= 3, f"{name} has fewer than three wrong answers"
    missed = []
    for name, reason, function in WRONG:
        with put(EXERCISES[name], function):
            told = verdict_on(EXERCISES[name])
        if "-v" in sys.argv:
            print(f"{name}: {reason}\n    {told}")
        if told == "passed":
            missed.append(f"{name}: {reason}")
        assert told == "passed" or "expected" in told or "Error" in told, f"{name}: {reason}: unclear: {told}"
        assert not re.match("(Name|Import|Attribute)Error", told), f"{name}: {reason}: no fair try: {told}"
    print(f"{len(WRONG)} wrong answers")
    assert not missed, f"wrong answers that pass: {missed}"


def test_no_test_runs_another_exercise():
    """The solution passes although the functions of all other exercises are blank, in every module."""
    modules = list(map(importlib.import_module, ("verifier", "env_gp", "env_virl", "eval", "sft", "rl")))

    def blank(*arguments, **keywords):
        raise NotImplementedError("another exercise")
    for e in EXERCISES.values():
        with contextlib.ExitStack() as stack:
            for other in EXERCISES.values():
                *owner, name = other.name.split(".")
                for module in modules * (other is not e and not other.block):
                    holder = getattr(module, owner[0], None) if owner else module
                    if hasattr(holder, name):
                        stack.enter_context(mock.patch.object(holder, name, blank))
            stack.enter_context(solved(e))
            assert verdict_on(e) == "passed", f"{e.name}: {verdict_on(e)}"


def run(*argv):
    """make.py in this process -> (what it printed, the line of its error)."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            make.main(list(argv))
    except SystemExit as error:
        return out.getvalue(), str(error.code)
    return out.getvalue(), None


def points(printed):
    """The output of check -> {exercise: (points, what was wrong)}."""
    lines = [line.split(None, 4) for line in printed.splitlines() if " / " in line]
    return {name: (int(got), "".join(rest)) for name, got, _, _, *rest in lines}


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield path


def change(path, old, new):
    with open(path, encoding="utf-8") as f:
        text = f.read()
    assert text.count(old) == 1, (old, text.count(old))
    with open(path, "w", encoding="utf-8") as f:
        f.write(text.replace(old, new))


TODO = '    raise NotImplementedError("exercise {}")\n'


def test_starter():
    """What a starter has and what it lacks. Bodies are blank; signatures, docstrings and the rest stay."""
    with folder() as path:
        assert run("starter", path) == (f"{path}: 18 exercises are to be written, 2 are to be added\n", None)
        there = {os.path.relpath(os.path.join(at, f), path) for at, _, files in os.walk(path) for f in files}
        assert {"README.md", "rl.py", "test_all.py", "requirements.txt", "results/figures.py",
                "assignments/README.md", "assignments/make.py", "assignments/exercises.py"} <= there, there
        hidden = ("instructor", "solutions", "test_class", "results/raw", "variants", ".git/", "out/",
                  "__pycache__")
        assert not [f for f in there for word in hidden if word in f], there
        for e in EXERCISES.values():
            lines, tree = make.read(os.path.join(path, e.file))
            if e.block:
                start, end = make.span(tree, lines, e)
                assert lines[start:end] == [" " * 4 + TODO.format(e.name), "\n"], lines[start:end]
                continue
            node = make.find(tree, e.name)
            solution = make.find(make.read(os.path.join(ROOT, e.file))[1], e.name)
            if e.added:
                assert node is None and solution is None, e.name
                continue
            assert make.ast.dump(node.args) == make.ast.dump(solution.args), e.name
            assert make.ast.get_docstring(node) == make.ast.get_docstring(solution), e.name
            *_, last = node.body
            assert isinstance(last, make.ast.Raise) and len(node.body) <= 2, e.name
            assert f'raise NotImplementedError("exercise {e.name}")' in lines[last.lineno - 1], e.name
        imported = subprocess.run([sys.executable, "-c", "import verifier, env_gp, env_virl"], cwd=path)
        assert imported.returncode == 0, "the starter's environments do not import"
    with folder() as path:
        below = os.path.join(path, "new", "place")
        run("starter", below, "gae", "Segment.add")
        lines, tree = make.read(os.path.join(ROOT, "rl.py"))
        body = make.find(tree, "gae").body
        lines[body[0].end_lineno:body[-1].end_lineno] = [TODO.format("gae")]
        assert make.read(os.path.join(below, "rl.py"))[0] == lines, "rl.py changed outside gae"


def test_check_in_a_starter():
    """A fresh starter has no points. A right function gets them in the starter and from the instructor."""
    with folder() as path:
        run("starter", path)
        got = points(run("check", path, "relative_word", "judge_gp", "gae", "group_baseline")[0])
        assert got["relative_word"] == (0, "not done yet: exercise relative_word"), got
        assert got["gae"] == (0, "not done yet: exercise gae"), got
        assert got["group_baseline"] == (0, "rl.py has no function group_baseline"), got
        assert got["total"][0] == 0, got
        change(f"{path}/verifier.py", TODO.format("relative_word"),
               "    turn = wrapped(new - old)\n    side = 'left' if turn < 0 else 'right'\n"
               "    return side if abs(turn) > LIMIT else 'slightly ' + side\n\n\n"
               "def wrapped(turn):\n    return operator.sub((turn + 180) % 360, 180)\n\n\n"
               "import operator\nLIMIT = 45\n")
        with open(f"{path}/rl.py", "a") as f:  # an addition below all else, with an import of its own
            f.write("\n\nimport functools as ft\n\n\n@ft.lru_cache(None)\n"
                    "def group_baseline(rewards, groups):\n"
                    "    means = {g: rewards[groups == g].mean() for g in set(groups.tolist())}\n"
                    "    return torch.stack([r - means[g] for r, g in zip(rewards, groups.tolist())])\n")
        names = "relative_word", "group_baseline"
        for script in (os.path.join(HERE, "make.py"), f"{path}/assignments/make.py"):
            done = subprocess.run([sys.executable, script, "check", ".", *names], cwd=path,
                                  capture_output=True, text=True)
            last = done.stdout.splitlines()[-1].split()
            assert last == ["total", "10", "/", "10"], done.stdout + done.stderr


def test_a_block_in_a_starter():
    """The student's lines between the banners, and their helpers, get into train(); other changes do not."""
    e, todo = EXERCISES["update"], " " * 4 + TODO.format("update")
    inside = textwrap.dedent(body(update)).replace("order = list(segments)", "order = copied(segments)")
    with folder() as path:
        run("starter", path, "update")
        change(f"{path}/rl.py", todo, textwrap.indent(inside, " " * 8))
        change(f"{path}/rl.py", "def train(", "from copy import copy as copied\n\n\ndef train(")
        change(f"{path}/rl.py", "factor = min(1,", "factor = 0 * min(1,")  # outside: the solution's is used
        assert points(run("check", path, "update")[0])["update"] == (30, "")
        with open(f"{path}/rl.py") as f:
            text = f.read()
        expected = "".join(make.read(os.path.join(ROOT, "rl.py"))[0])
        at, end = expected.index("        # ==== UPDATE"), expected.index("        # ==== LOG")
        at = expected.index("\n", at) + 1
        expected = expected[:at] + textwrap.indent(inside, " " * 8) + "\n" + expected[end:]
        expected = expected.replace("def train(", "from copy import copy as copied\ndef train(")
        assert make.assembled(e, path) == expected
        half = text.replace("        done = False\n", "        finally:\n            pass\n", 1)
        half = half.replace("        # ==== UPDATE", "        try:\n            pass\n        # ==== UPDATE")
        for new, words in (
                (text.replace("# ==== LOG", "# LOG"), "expected one line that begins with '# ==== LOG'"),
                (text.replace("def train(", "def trains("), "rl.py has no function train"),
                (half, "are not whole statements")):
            with open(f"{path}/rl.py", "w") as f:
                f.write(new)
            passed, why, _ = make.check(e, path, 60)
            assert not passed and words in why, (words, why)
        start = text.index("    while True:")
        end = text.index("\n\n\n", start)
        with open(f"{path}/rl.py", "w") as f:  # a tree of another depth
            f.write(text[:start] + "    if True:\n" + textwrap.indent(text[start:end], "    ") + text[end:])
        assert make.assembled(e, path).split() == expected.split()
        make.ast.parse(make.assembled(e, path))


def test_one_mistake_costs_one_exercise():
    """A print, exit, hang, crash, changed helper or file that does not parse costs no other exercise."""
    with folder() as path:
        run("starter", path, "relative_word", "solutions", "GeneralPoints.step", "judge_gp")
        for body, told in (("    print('passed')\n    import sys\n    sys.exit(0)\n", "SystemExit: 0"),
                           ("    import os\n    os._exit(0)\n", "ended before the test did (exit code 0)"),
                           ("    while True:\n        print('again')\n", "no verdict within 3 seconds"),
                           ("    return 'left'\n", "(350, 10): expected 'slightly right', got 'left'"),
                           ("    return old / 0\n", "division by zero, at `return old / 0`"),
                           ("    raise KeyboardInterrupt\n", "KeyboardInterrupt"),
                           ("    return x\n", "name 'x' is not defined")):
            with folder() as copy:
                make.shutil.copytree(path, copy, dirs_exist_ok=True)
                change(f"{copy}/verifier.py", TODO.format("relative_word"), body)
                change(f"{copy}/verifier.py", "def says_intersection(", "def compass_word(heading):\n"
                       "    return 1 / 0\n\n\ndef says_intersection(")  # changed: the solution's is used
                more = ["--seconds", "3"] if "while" in body else ["solutions"]
                got = points(run("check", copy, "relative_word", *more)[0])
                assert got["relative_word"][0] == 0 and told in got["relative_word"][1], (told, got)
                assert "while" in body or got["solutions"] == (0, "not done yet: exercise solutions"), got
        change(f"{path}/env_gp.py", TODO.format("solutions"),  # right, under the decorator that is there
               "    found = map(write, reachable(numbers).get(Fraction(target), ()))\n"
               "    return tuple(sorted(found, key=lambda s: (len(s), s)))\n")
        with open(f"{path}/verifier.py", "a") as f:
            f.write("def broken(:\n")
        got = points(run("check", path, "judge_gp", "relative_word", "solutions")[0])
        assert "verifier.py does not parse: line" in got["judge_gp"][1] and got["solutions"] == (10, ""), got
        os.remove(f"{path}/verifier.py")
        got = points(run("check", path, "relative_word", "solutions")[0])
        assert got["relative_word"] == (0, "verifier.py is not in the folder") and got["total"][0] == 10, got


def test_gradescope():
    with folder() as path:
        file = os.path.join(path, "results.json")
        run("starter", f"{path}/s", "judge_gp")
        change(f"{path}/s/verifier.py", TODO.format("judge_gp"),
               "    print('two', answer[:9])\n    print('lines')\n" + TODO.format("judge_gp"))
        with mock.patch.object(os, "cpu_count", lambda: 64), \
                mock.patch.object(make, "ThreadPoolExecutor", wraps=ThreadPoolExecutor) as pool:
            printed, error = run("check", f"{path}/s", "relative_word", "judge_gp", "--gradescope", file)
        pool.assert_called_once_with(4)  # a container has not the memory of a host with 64 cores
        with open(file) as f:
            results = json.load(f)
        assert error is None and results == {"tests": [
            {"name": "sheet 1: relative_word", "score": 5, "max_score": 5, "output": "passed"},
            {"name": "sheet 1: judge_gp", "score": 0, "max_score": 10,
             "output": "not done yet: exercise judge_gp\nprinted: two {\"formula\nprinted: lines"}]}
        assert f"{'':22}printed: lines\n" in printed, printed


def test_the_repository_has_all_points_but_the_additions():
    """Graded as a student's folder: each file comes out unchanged, and each exercise has its process."""
    with ThreadPoolExecutor() as pool:
        verdicts = list(pool.map(lambda e: make.check(e, ROOT, 60), EXERCISES.values()))
    for e, verdict in zip(EXERCISES.values(), verdicts):
        assert verdict[0] == (not e.added), (e.name, verdict)
        if not e.added:
            assert make.assembled(e, ROOT) == "".join(make.read(os.path.join(ROOT, e.file))[0]), e.name
    assert sum(e.points for e, verdict in zip(EXERCISES.values(), verdicts) if verdict[0]) == 170


def test_the_handout_agrees_with_the_code():
    """Names, files and points of the exercises; the banners to stop at; the flags of all commands."""
    texts = {}
    for name in ("README.md", "instructor.md"):
        with open(os.path.join(HERE, name), encoding="utf-8") as f:
            texts[name] = f.read()
    headings = re.findall(r"^### (\S+), (in|new in) (\S+): (\d+) points", texts["README.md"], re.M)
    assert headings == [(e.name, "new in" if e.added else "in", e.file, str(e.points))
                        for e in EXERCISES.values()], headings
    banners = re.findall(r'^\| \d+ \| (\w+\.py)\b.*banner "([^"]+)"', texts["README.md"], re.M)
    assert len(banners) == 4, banners
    for file, banner in banners:
        text = "".join(make.read(os.path.join(ROOT, file))[0])
        assert re.search(rf"^# -{{20,}}\n# {banner}\b", text, re.M), (file, banner)
    rows = re.search(r"these tests work \|\n\|---.*?\n((\|.*\n)+)", texts["README.md"])[1]
    named = re.findall(r"\w+", re.sub(r"(?m)^\|[^|]*\||and all others", "", rows))
    with open(os.path.join(ROOT, "test_all.py"), encoding="utf-8") as f:
        tests = set(re.findall(r"^def test_(\w+)", f.read(), re.M))
    assert len(named) > 15 and set(named) <= tests, set(named) - tests
    commands = [found for text in texts.values()
                for found in re.findall(r"python (rl|sft|eval)\.py((?: -?[-\w./]+)+)", text)]
    assert len(commands) > 10, commands
    for script in ("rl", "sft", "eval"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            importlib.import_module(script).main(["--help"])
        flags = {flag for of, words in commands if of == script for flag in re.findall(r"--\w+", words)}
        unknown = flags - set(re.findall(r"^ +(--\w+)", out.getvalue(), re.M))
        assert flags and not unknown, (script, unknown)


def test_bad_input():
    with folder() as path:
        open(f"{path}/file", "w").close()
        for argv, words in ((["starter", path], "is not an empty folder"),
                            (["starter", f"{path}/file"], "is not an empty folder"),
                            (["starter", f"{path}/file/below"], "Not a directory"),
                            (["starter", f"{path}/new", "gea"], "no exercise gea; there are relative_word"),
                            (["check", f"{path}/new"], "is not a folder"),
                            (["check", path, "gae", "score"], "has no eval.py and no rl.py"),
                            (["check", ROOT, "gae", "--gradescope", f"{path}/no/file"], "No such file")):
            printed, error = run(*argv)
            assert error and error.startswith("error: ") and words in error, (argv, error)
            assert "\n" not in error, (argv, error)
            assert not printed and not os.path.exists(f"{path}/new"), (argv, printed)


def main():
    failed, tests = 0, [(name, f) for name, f in globals().items() if name.startswith("test_")]
    for name, test in tests:
        start, error = time.time(), None
        try:
            test()
        except Exception as e:
            failed, error = failed + 1, e
        print(f"{'FAILED' if error else 'ok':6} {name} ({time.time() - start:.1f} s)"
              + f"\n       {type(error).__name__}: {error}" * bool(error), flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
