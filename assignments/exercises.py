"""exercises.py: the exercises of the class, each with its points and its test. make.py runs them.

    python assignments/make.py check . gae        # checks one exercise of this folder

A test gets the module that holds the function. It calls no function of another exercise: where the function
needs one, the test replaces that one with a stub. So an exercise can be checked before the others are solved.
The expected results are written as numbers. A failed test says what was expected and what the function gave.
"""
import contextlib
import copy
import importlib
import io
import json
import math
import os
import sys
import threading
import traceback
from collections import namedtuple
from itertools import product
from types import SimpleNamespace
from unittest import mock


# ------------------------------------------------------------------------------------------------------------
# Helpers.

def equal(actual, expected, what):
    """Two values of one type must be equal. Of long values the first difference is shown."""
    if actual == expected and type(actual) is type(expected):
        return
    if type(actual) is type(expected) and isinstance(expected, (list, tuple, dict)):
        keys = list(expected) if isinstance(expected, dict) else range(max(len(actual), len(expected)))
        a, b = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (actual, expected))
        key = next((k for k in keys if a.get(k, a) != b.get(k, b)), None)
        if key is not None and len(repr(expected)) > 80:
            shown = [repr(x[key]) if key in x else "nothing" for x in (b, a)]
            raise AssertionError(f"{what}: first difference at {key!r}: expected {shown[0]}, got {shown[1]}")
    raise AssertionError(f"{what}: expected {expected!r}, got {actual!r}")


def near(actual, expected, what, tolerance=1e-4):
    """Two tensors, lists of numbers or numbers. Shapes must agree, and all numbers to within `tolerance`."""
    import torch
    many = torch.is_tensor(expected) or isinstance(expected, list)
    assert torch.is_tensor(actual) or (isinstance(actual, (int, float)) and not many), (
        f"{what}: expected a {'tensor' if many else 'number'}, got {actual!r}")
    a, b = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    shown = [f"[{', '.join(f'{v:.6g}' for v in x.flatten()[:8].tolist())}{', ...' * (x.numel() > 8)}]"
             if x.ndim else f"{x.item():.6g}" for x in (b, a)]
    assert a.shape == b.shape, (f"{what}: expected {shown[0]} of shape {list(b.shape)}, got {shown[1]} of "
                                f"shape {list(a.shape)}")
    wrong = ((a - b).abs() <= tolerance).logical_not().flatten().nonzero().flatten().tolist()  # NaN is wrong
    if wrong and a.numel() > 8:
        i = wrong[0]
        raise AssertionError(f"{what}: {len(wrong)} of {a.numel()} numbers differ, the first at {i}: expected "
                             f"{b.flatten()[i]:.6g}, got {a.flatten()[i]:.6g}")
    assert not wrong, f"{what}: expected {shown[0]}, got {shown[1]}"


def several(got, names):
    """What a function returned must be a tuple of so many -> the tuple."""
    assert isinstance(got, (tuple, list)) and len(got) == len(names), (
        f"the result: expected ({', '.join(names)}), got " + (
            f"{len(got)} things" if isinstance(got, (tuple, list)) else f"one {type(got).__name__}"))
    return got


def one_process():
    """What eval.setup() returns on one CPU."""
    import torch
    return SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, rank=0, world=1,
                           amp=contextlib.nullcontext)


def small_model():
    """A random Llama over 24 tokens. Its weights are large, so that it is sure of some tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=32,
                                         num_hidden_layers=2, num_attention_heads=2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim == 2 else 1)
    return model


def two_conversations(segment_class):
    """The longer one comes first. Each has two answers, with feedback between them. Token 0, which pads, is
    also a token that the model says."""
    return [segment_class([5, 6, 7, 8, 9, 0, 3, 11, 0], [0, 0, 1, 1, 0, 0, 0, 1, 1], [0.0] * 9),
            segment_class([12, 4, 13, 14, 0], [0, 0, 1, 0, 1], [0.0] * 5)]


SAID = [[(2, 7), (3, 8), (7, 11), (8, 0)], [(2, 13), (4, 0)]]  # the action tokens of both: (position, token)


def log_probs(model, segments, temperature=1.0, never=()):
    """The distribution that each action token was drawn from, in reading order -> [N, V], and the action
    tokens, [N]. It runs one row at a time, so that nothing is padded."""
    import torch
    rows, tokens = [], []
    for segment, said in zip(segments, SAID):
        logits = model(torch.tensor([segment.ids])).logits[0] / temperature
        for place, token in said:
            row = logits[place - 1].clone()
            row[list(never)] = -1e9
            rows.append(row.log_softmax(-1))
            tokens.append(token)
    return torch.stack(rows), torch.tensor(tokens)


def forward_of_two(model, segments, pad_id, machine, **options):
    """A stub for forward() that knows only these two conversations: SAID says where the model speaks."""
    import torch
    places = [SAID[0] if len(s.ids) == 9 else SAID[1] for s in segments]
    ids = torch.full((len(segments), max(len(s.ids) for s in segments)), pad_id)
    keep = torch.zeros_like(ids, dtype=torch.bool)
    for i, (segment, said) in enumerate(zip(segments, places)):
        ids[i, :len(segment.ids)] = torch.tensor(segment.ids)
        keep[i, [place - 1 for place, _ in said]] = True
    out = model(ids, **options)
    return out, out.logits[keep], keep, torch.tensor([token for said in places for _, token in said])


# ------------------------------------------------------------------------------------------------------------
# Sheet 1: the verifier and the environments.

def test_relative_word(m):
    for old, new, word in ((10, 280, "left"), (350, 10, "slightly right"), (10, 350, "slightly left"),
                           (0, 45, "slightly right"), (0, 46, "right"), (0, 315, "slightly left"),
                           (0, 314, "left"), (90, 90, "slightly right"), (90, 270, "left"), (270, 90, "left"),
                           (359.5, 0.5, "slightly right"), (300, 20, "right"), (20, 300, "left"),
                           (0, 45.5, "right"), (10.5, 10.25, "slightly left")):
        equal(m.relative_word(old, new), word, f"relative_word({old}, {new})")
    for old, turn in product(range(0, 360, 7), range(-180, 180)):
        word = ["slightly ", ""][abs(turn) > 45] + ["right", "left"][turn < 0]
        equal(m.relative_word(old, (old + turn) % 360), word, f"relative_word({old}, {(old + turn) % 360})")


def test_judge_gp(m):
    hand, shown = [8, 3, 3, 8], ["8", "3", "3", "8"]
    right = "8/(3-8/3)"
    for answer, cards, kind in (
            ('{"formula": "8/(3-8/3)"}', None, "correct"),
            ('I try {"formula": "1+1"}. No: {"formula": "8 / (3 - 8/3) = 24"}', None, "correct"),
            ('{"formula": "8/(3-8/3)=23"}', None, "wrong_value"),
            ('{"formula": "3*8+3-8=24"}', None, "wrong_value"),
            ('{"formula": "3*8+8-8"}', None, "wrong_numbers"),       # makes 24, with an 8 too many
            ('{"formula": "3+3+8"}', None, "wrong_numbers"),         # neither numbers nor value: one verdict
            ('{"formula": "8*3"}', None, "wrong_numbers"),
            ('{"formula": "1+1=23"}', None, "wrong_numbers"),        # the claim is looked at with the value
            ('{"formula": "8/(3-8/3"}', None, "illegal"),
            ('{"formula": "=24"}', None, "illegal"),
            ('{"formula": "8/(3-8/3)=24=24"}', None, "illegal"),
            ('{"formula": "24=8/(3-8/3)"}', None, "illegal"),        # a claim is a number
            ('{"formula": 24}', None, "illegal"),
            ('{"number": [3, 3, 8, 8]}', None, "illegal"),
            ('{"formula": "8/(3-8/3) = 24 "}', None, "correct"),
            ('{"formula": "8/(3-8/3)="}', None, "illegal"),          # a claim is one to four digits
            ('{"formula": "8/(3-8/3)=24.0"}', None, "illegal"),
            ('{"formula": "8/(3-8/3)=-5"}', None, "illegal"),
            ('{"formula": "8/(3-8/3)=00024"}', None, "illegal"),
            ('{"formula": "8/(3-8/3)=\u0662\u0664"}', None, "illegal"),
            ('{"formula": "8/(3-8/3)=24"}', None, "correct"),
            ('{"formula": "3+8*3/(8-8)"}', None, "illegal"),
            ('{"formula": "1/0"}', None, "illegal"),
            ('{"formula": ["8/(3-8/3)"]}', None, "illegal"),
            ('{"formula": null}', None, "illegal"),
            ("", None, "illegal"),
            ("8/(3-8/3)", None, "illegal"),
            ("8/(3-8/3)", shown, "illegal"),                         # no JSON comes before the cards
            ('{"cards": ["8", "3", "8", "3"], "formula": "%s"}' % right, shown, "correct"),
            ('{"cards": [8, 3, 3, 8], "formula": "%s"}' % right, shown, "correct"),
            ('{"cards": ["3", "8", "8", "8"], "formula": "%s"}' % right, shown, "misread"),
            ('{"cards": ["3", "8", "8", "8"], "formula": "8/"}', shown, "misread"),  # cards before formula
            ('{"cards": "3388", "formula": "%s"}' % right, shown, "misread"),
            ('{"formula": "%s"}' % right, shown, "misread"),
            ('{"cards": 3388, "formula": "%s"}' % right, shown, "misread"),
            ('{"cards": {"3": 8}, "formula": "%s"}' % right, shown, "misread"),
            ('{"cards": [["3", 3], 8, null, "8"], "formula": "%s"}' % right, shown, "misread"),
            ('{"cards": null}', shown, "misread"),
            ("{}", shown, "misread"),                                # empty JSON is JSON
            ("{}", None, "illegal"),
            ('{"cards": ["K"], "formula": "%s"}' % right, None, "correct")):         # nothing was to be read
        judged(m, kind, answer, hand, cards=cards)
    for answer, kind, numbers in (
            ("8/(3-8/3)", "correct", [8, 3, 8, 3]), ("3*8+3-8", "wrong_value", [3, 8, 3, 8]),
            ("8*8+3", "wrong_numbers", [8, 8, 3]), ("8*8+", "illegal", None), (right, "misread", None)):
        verdict = judged(m, kind, '{"formula": "%s"}' % answer, hand, cards=shown if kind == "misread" else None)
        equal(verdict.numbers, numbers, f"the numbers in the verdict on {answer}, which is {kind}")
    judged(m, "wrong_value", '{"formula": "(7*7)/(1+1)"}', [7, 7, 1, 1])   # 24.5, which is not rounded
    judged(m, "wrong_value", '{"formula": "(5*5-1-1/2)"}', [5, 5, 1, 1, 2])  # 23.5
    judged(m, "correct", '{"formula": "3*(1+3)"}', [1, 3, 3], target=12)
    judged(m, "wrong_value", '{"formula": "3*(1+3)=24"}', [1, 3, 3], target=12)


def judged(m, kind, answer, hand, target=24, cards=None):
    """judge_gp() must return this kind, with its reward and feedback -> the Verdict."""
    given = list(hand)
    call = f"judge_gp({answer!r}, {hand}, target={target}, cards={cards})"
    try:
        verdict = m.judge_gp(answer, given, **{} if target == 24 else {"target": target}, cards=cards)
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(f"{call}: expected {kind!r}, got {complaint(error, 'verifier.py')}")
    assert hasattr(verdict, "kind"), f"{call}: expected a Verdict, got {verdict!r}"
    equal(verdict.kind, kind, f"{call}: the kind")
    equal((verdict.reward, verdict.feedback), (m.GP_REWARD[kind], m.GP_FEEDBACK[kind]),
          f"{call}: reward, feedback")
    equal(given, hand, f"{call}: the hand after the call")
    return verdict


def test_solutions(m):
    equal(m.solutions((3, 3, 8, 8)), ("8/(3-8/3)",), "solutions((3, 3, 8, 8))")
    equal(m.solutions((1, 1, 1, 1)), (), "solutions((1, 1, 1, 1))")
    equal(m.solutions((1, 5, 5, 5)), ("(5-1/5)*5",), "solutions((1, 5, 5, 5))")
    equal(m.solutions((3, 5, 7, 13)), ("(13*5+7)/3",), "solutions((3, 5, 7, 13))")
    equal(m.solutions((4, 4, 10, 10)), ("(10*10-4)/4",), "solutions((4, 4, 10, 10))")
    equal(m.solutions((1, 1, 2, 3), 36), (), "solutions((1, 1, 2, 3), 36)")
    equal(m.solutions((1, 2, 3, 4), 10), (
        "1*2*3+4", "1*3*4-2", "1*4+2*3", "1+2+3+4", "2*3+4/1", "2*3/1+4", "2*4+3-1", "3*4-1*2", "3*4-2/1",
        "3*4/1-2", "(1+3/2)*4", "(2*3+4)*1", "(2*3+4)/1", "(3*4-2)*1", "(3*4-2)/1", "(3-1)*4+2", "(3-1/2)*4",
        "2-(1-3)*4"), "solutions((1, 2, 3, 4), 10)")
    counts = [len(m.solutions(hand)) for hand in ((1, 2, 3, 4), (2, 3, 5, 12), (4, 6, 8, 12), (5, 6, 7, 8))]
    equal(counts, [4, 1, 8, 3], "numbers of distinct solutions of four hands")


def game(m, cards, numbers, verify, **more):
    """An episode in its first state, with a hand of our own: reset() would call the solver."""
    env = m.GeneralPoints(verify=verify, **more)
    env.cards, env.numbers, env.attempts = cards, numbers, 0
    env.images = ["a picture"] if env.vl else []
    env.messages = [{"role": "user", "content": "Make 24."}]
    return env


def test_step(m):
    Verdict = namedtuple("Verdict", "kind reward feedback numbers action", defaults=(None, None))
    verdicts = {"right": Verdict("correct", 5.0, "Correct.", [10, 10, 4, 1]),
                "poor": Verdict("wrong_value", -1.0, "No.", [10, 10, 4, 1]),
                "other": Verdict("wrong_numbers", -2.0, "Numbers.", [13, 4, 1, 11]),
                '{"cards": ["K", "J"]}': Verdict("misread", -1.5, "Look."),
                "lost": Verdict("illegal", -3.0, "No formula.")}
    asked = []

    def judge(answer, numbers, target=24, cards=None):
        asked.append((answer, list(numbers), target, cards))
        return verdicts[answer]
    with mock.patch.object(m, "judge_gp", judge):
        env = game(m, ["K", "J", "4", "A"], [10, 10, 4, 1], 3)
        first = env.messages
        step = env.step("poor")
        equal(asked[-1], ("poor", [10, 10, 4, 1], 24, None), "what judge_gp was asked")
        said = [{"role": "assistant", "content": "poor"}, {"role": "user", "content": "No."}]
        equal(step.messages, [{"role": "user", "content": "Make 24."}, *said], "messages, attempt 1 of 3")
        equal(len(first), 1, "messages in the list that reset() returned, after a step")
        equal((step.reward, step.done, step.images), (-1.0, False, []), "reward, done, images; attempt 1")
        expected = dict(verdict="wrong_value", success=False, position_done=False, position_solved=False,
                        rule_matters=True, recognized=None, other_rule=False)
        equal(step.info, expected, "info after attempt 1 of 3")
        step = env.step("other")
        equal(step.info, {**expected, "verdict": "wrong_numbers", "other_rule": True}, "info, other rule")
        equal(len(step.messages), 5, "messages after attempt 2 of 3")
        step = env.step("poor")
        equal((step.messages, step.done), (None, True), "messages, done after attempt 3 of 3")
        equal(step.info, {**expected, "position_done": True}, "info after attempt 3 of 3")
        step = game(m, ["K", "J", "4", "A"], [10, 10, 4, 1], 3).step("right")
        equal((step.messages, step.reward, step.done), (None, 5.0, True), "messages, reward, done; solved")
        equal((step.info["success"], step.info["position_solved"]), (True, True), "success when solved")
        step = game(m, ["10", "10", "4", "A"], [10, 10, 4, 1], 1).step("right")
        equal((step.info["rule_matters"], step.info["other_rule"]), (False, False), "no face card: rule info")
        step = game(m, ["K", "J", "4", "A"], [10, 10, 4, 1], 2).step("lost")
        equal((step.info["verdict"], step.info["other_rule"]), ("illegal", False),
              "verdict, other_rule; an illegal answer")
        step = game(m, ["K", "J", "4", "A"], [13, 11, 4, 1], 2, rule="ood").step("poor")
        equal((step.info["rule_matters"], step.info["other_rule"]), (True, True),
              "rule_matters, other_rule; K and J count as 10 under rule ood")
        env = game(m, ["K", "J", "4", "A"], [10, 10, 4, 1], 2, vl=True)
        step = env.step('{"cards": ["K", "J"]}')
        equal(asked[-1][3], ["K", "J", "4", "A"], "the cards that judge_gp was given, with pictures")
        equal((step.images, step.info["recognized"]), (["a picture"], 0.5), "images, recognized; pictures")
        step = env.step('{"cards": ["K", "J"]}')
        equal((step.messages, step.images), (None, []), "messages, images; an episode with pictures is over")


# ------------------------------------------------------------------------------------------------------------
# Sheet 2: tokens, masks and scores.

def test_segment_add(m):
    first = [5, 6, 7]
    s = m.Segment(first)
    s.add([], 0)
    equal((s.ids, s.action_mask, s.reward), ([5, 6, 7], [0, 0, 0], [0.0] * 3),
          "ids, action_mask, reward: add([], 0)")
    s.add([8, 9], 1)
    s.reward[-1] = -1.0
    equal((s.ids, s.action_mask), ([5, 6, 7, 8, 9], [0, 0, 0, 1, 1]), "ids, action_mask after add([8, 9], 1)")
    s.add([3], 0)
    s.add([4, 2], 1)
    equal(s.action_mask, [0, 0, 0, 1, 1, 0, 1, 1], "action_mask after add([3], 0) and add([4, 2], 1)")
    equal(s.reward, [0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0], "reward; the -1 was there before")
    equal(s.ids, [5, 6, 7, 8, 9, 3, 4, 2], "ids in the end")
    equal(first, [5, 6, 7], "the list of ids that Segment() was given")
    s = m.Segment([1, 2])
    s.add([3], 1)
    equal(s.action_mask, [1, 1, 1], "action_mask of Segment([1, 2]) after add([3], 1)")


def test_glue_ids(m):
    from tokenizers.processors import TemplateProcessing
    from sft import build_tiny
    tok = build_tiny("gp", 0)[1]
    plain, refuse = tok.chat_template, "{% if COND %}{{ raise_exception('refused') }}{% endif %}"
    ends = "{% if m['role'] == 'assistant' and COND %}<|pad|>{% else %}<|end|>{% endif %}"
    mark = "<|{{ m['role'] }}|>"
    before = mark + "{% if m['role'] == 'assistant' %}HEADER{% endif %}"
    most = "<|end|>", "<|user|>Try again.<|end|><|assistant|>", "<|end|>"
    templates = (  # what it is, the template, an answer's end, what stands behind that, what the model ends with
        ("the repository's template", plain, *most),
        ("a template with a newline behind <|end|>", plain.replace("<|end|>", "<|end|>\n"),
         "<|end|>", "\n<|user|>Try again.<|end|>\n<|assistant|>", "<|end|>"),
        ("a template with a space before <|end|>", plain.replace("<|end|>", " <|end|>"),
         " <|end|>", "<|user|>Try again. <|end|><|assistant|>", "<|end|>"),
        ("a template with a space before an answer", plain.replace(mark, before.replace("HEADER", " ")), *most),
        ("a template that wants the user's turn first",
         refuse.replace("COND", "messages[0]['role'] != 'user'") + plain, *most),
        ("a template that refuses some answers", plain.replace("<|end|>", refuse.replace(
            "COND", "'forbidden' in m['content'] | string") + "<|end|>"), *most),
        ("a template that ends the last turn with <|pad|> and earlier ones with <|end|>",
         plain.replace("<|end|>", ends.replace("COND", "loop.last")), *most[:2], "<|pad|>"),
        ("a template that ends the last turn with <|end|> and earlier answers with <|pad|>",
         plain.replace("<|end|>", ends.replace("COND", "not loop.last")), "<|pad|>", *most[1:]),
        ("a template whose turns are ended by the next role's mark", plain.replace("<|end|>", ""),
         "<|user|>", "Try again.<|assistant|>", "<|user|>"),
        ("a template whose turns are ended by a newline and the next role's mark",
         plain.replace("<|end|>", "{{ '\n' }}"), "\n<|user|>", "Try again.\n<|assistant|>", "<|user|>"),
        ("a template in words, in which nothing ends a turn", "{% for m in messages %}{{ m['role'] }}: "
         "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
         "", "\nuser: Try again.\nassistant:", "<|end|>"),
        ("a template that names a channel before an answer", plain.replace(mark, before.replace("HEADER", "final:")),
         "<|end|>", "<|user|>Try again.<|end|><|assistant|>final:", "<|end|>"))
    first, again = {"role": "user", "content": "Make 24."}, {"role": "user", "content": "Try again."}
    chats = (("the first answer", [first, {"role": "assistant", "content": "two  words"}, again]),
             ("an answer that is also a part of the feedback",
              [first, {"role": "assistant", "content": "again"}, again]),
             ("an answer after one with @@ANSWER@@ and one that is 'forbidden'",
              [first, {"role": "assistant", "content": "@@ANSWER@@"}, {"role": "user", "content": "No."},
               {"role": "assistant", "content": "forbidden"}, {"role": "user", "content": "No."},
               {"role": "assistant", "content": "two  words"}, again]))

    def check(messages, last, text, what):
        given, form = [dict(message) for message in messages], copy.deepcopy(m.turn_form(tok, tok.chat_template))
        expected = tok(text, add_special_tokens=False).input_ids
        try:
            got = m.glue_ids(tok, given, last)
        except SystemExit as error:
            raise AssertionError(f"glue behind {what}: expected {text!r}, got {str(error)!r}")
        shown = f"{tok.decode(got)!r} = {got}" if isinstance(got, list) else repr(got)
        assert got == expected, f"glue behind {what}: expected {text!r} = {expected}, got {shown}"
        equal(given, messages, f"the messages after the call, {what}")
        equal(m.turn_form(tok, tok.chat_template), form,
              f"turn_form()'s result, which is kept for later calls, {what}")
    for name, tok.chat_template, end, behind, said in templates:
        for what, messages in chats:
            check(messages, tok.convert_tokens_to_ids(said), behind, f"{what}, which ended, {name}")
            check(messages, None, end + behind, f"{what}, which was cut, {name}")
            if said == "<|user|>":
                check(messages, tok.pad_token_id, end + behind, f"{what}, which ended with <|pad|>, {name}")
    tok.chat_template = plain
    check(messages, 0, most[1], "an answer that ended with the token of id 0")
    tok._tokenizer.post_processor = TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", tok.pad_token_id)])
    check(messages, None, most[0] + most[1], "an answer that was cut; the tokenizer puts <|pad|> before a text "
          "unless add_special_tokens is False")


def test_forward(m):
    import torch
    model, machine = small_model(), one_process()
    segments = two_conversations(m.Segment)
    for part in ([0, 1], [1]):
        what = f"of {len(part)} conversations"
        out, logits, keep, said = several(m.forward(model, [segments[i] for i in part], 0, machine),
                                          ("output", "logits", "positions", "tokens"))
        expected = [[token for _, token in SAID[i]] for i in part]
        near(said, sum(expected, []), f"the action tokens {what}")
        width = max(len(segments[i].ids) for i in part)
        marks = [[int(t + 1 in dict(SAID[i])) for t in range(width)] for i in part]
        near(keep.long(), marks, f"the positions that score an action token {what}")
        equal(keep.dtype, torch.bool, "the dtype of the positions")
        alone = [model(torch.tensor([segments[i].ids])).logits[0] for i in part]
        rows = torch.cat([x[[place - 1 for place, _ in SAID[i]]] for i, x in zip(part, alone)])
        near(logits, rows, f"the logits {what}", 1e-3)
    assert logits.requires_grad, "logits: expected a gradient to the model, got none"
    out = m.forward(model, segments, 0, machine, output_hidden_states=True)[0]
    assert out.hidden_states is not None, ("the output with output_hidden_states=True: expected hidden states, "
                                           "got None: the options did not reach the model")
    equal(list(out.hidden_states[-1].shape), [2, 9, 16], "the last hidden states' shape, by an option")
    # In bf16, as on a GPU.
    machine.amp = lambda: torch.autocast("cpu", torch.bfloat16)
    inside = []
    with hooked(model, lambda *_: inside.append(torch.is_autocast_enabled("cpu"))):
        logits = m.forward(model, segments, 0, machine)[1]
    equal(inside, [True], "does the model run inside machine.amp(), at each call")
    equal(logits.dtype, torch.float32, "the dtype of the logits inside bf16 autocast")
    # With pictures.
    given = {}

    class Pictured(torch.nn.Module):
        def forward(self, input_ids=None, attention_mask=None, pixel_values=None, **options):
            given.update(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    for segment, i in zip(segments, (1.0, 2.0)):
        segment.pictures = {"pixel_values": torch.full((1, 3, 2, 2), i)}
    m.forward(Pictured(), segments, 0, one_process())
    for name, expected in (("pixel_values", torch.cat([s.pictures["pixel_values"] for s in segments])),
                           ("attention_mask", torch.tensor([[1] * 9, [1] * 5 + [0] * 4]))):
        assert given[name] is not None, f"{name}: expected collate()'s in the model's arguments, got none"
        near(given[name], expected, f"{name} in the model's arguments")


@contextlib.contextmanager
def hooked(model, hook):
    handle = model.register_forward_pre_hook(hook)
    yield
    handle.remove()


def test_score(m):
    with mock.patch.object(m, "forward", forward_of_two):
        score_is_right(m)


def score_is_right(m):
    import torch
    model, machine = small_model(), one_process()
    segments = two_conversations(m.Segment)
    for temperature in (1.0, 0.7):
        got = several(m.score(model, segments, 0, machine, temperature), ("logp", "entropy", "value"))
        rows, tokens = log_probs(model, segments, temperature)
        near(got[0], rows[range(6), tokens], f"logp at temperature {temperature}", 1e-3)
        near(got[1], -(rows.exp() * rows).sum(-1), f"entropy at temperature {temperature}", 1e-3)
        equal(got[2], None, "value without a head")
    for column, what in ((0, "logp"), (1, "entropy")):
        assert got[column].requires_grad, f"{what}: expected a gradient to the model, got none"
    got = m.score(model, segments, 0, machine, temperature, entropy_grad=False)
    equal((got[0].requires_grad, got[1].requires_grad), (True, False), "gradients with entropy_grad=False")
    equal((got[0].dtype, got[1].dtype), (torch.float32,) * 2, "the dtypes of logp and entropy")
    head = torch.nn.Linear(16, 1)
    states = [model(torch.tensor([s.ids]), output_hidden_states=True).hidden_states[-1][0] for s in segments]
    expected = torch.stack([head(h[place - 1])[0] for h, said in zip(states, SAID) for place, _ in said])
    near(m.score(model, segments, 0, machine, 1.0, head)[2], expected, "value", 1e-3)
    model.generation_config.suppress_tokens = [7, 20]
    rows, _ = log_probs(model, segments, 1.0, never=(7, 20))
    got = m.score(model, segments[1:], 0, machine)
    near(got[0], rows[[4, 5], [13, 0]], "logp where rollout() never samples the tokens 7 and 20", 1e-3)
    near(got[1], -(rows.exp() * rows).sum(-1)[4:], "entropy, where 7 and 20 are never sampled", 1e-3)

    def in_bf16(*arguments, **options):  # as FSDP has them; the logits that forward() returns are in fp32
        out, *rest = forward_of_two(*arguments, **options)
        return SimpleNamespace(hidden_states=[h.bfloat16() for h in out.hidden_states]), *rest
    with mock.patch.object(m, "forward", in_bf16):
        value = m.score(model, segments, 0, machine, 1.0, head)[2]
    equal(value.dtype, torch.float32, "the dtype of value where hidden states are in bf16")
    near(value, expected, "value where hidden states are in bf16", 0.1)


def test_sft_loss(m):
    with mock.patch.object(m, "forward", forward_of_two):
        sft_loss_is_right(m)


def sft_loss_is_right(m):
    model, machine = small_model(), one_process()
    rows = two_conversations(m.Segment)
    logp, tokens = log_probs(model, rows)
    each = -logp[range(6), tokens]
    for part, expected, what in (([0], each[:4], "one row"), ([1], each[4:], "a shorter row"),
                                 ([0, 1], each, "both rows, padded")):
        for denominator in (1, 10):
            got = m.sft_loss(model, [rows[i] for i in part], denominator, 0, machine)
            near(got, expected.sum() / denominator, f"loss of {what}, denominator {denominator}", 1e-3)
    assert got.requires_grad, "loss: expected a gradient to the model, got none"


def test_dft_loss(m):
    with mock.patch.object(m, "forward", forward_of_two):
        dft_loss_is_right(m)


def dft_loss_is_right(m):
    model, machine = small_model(), one_process()
    rows = two_conversations(m.Segment)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return model.lm_head.weight.grad.flatten().clone()
    for part, behind, what in (([0, 1], slice(0, 6), "both rows"), ([1], slice(4, 6), "the shorter row")):
        logp, tokens = log_probs(model, rows)
        logp = logp[range(6), tokens][behind]
        got = m.dft_loss(model, [rows[i] for i in part], 10, 0, machine)
        near(got, (logp.exp() * -logp).sum() / 10, f"loss of {what}, denominator 10", 1e-3)
        assert got.requires_grad, "loss: expected a gradient to the model, got none"
        slope = gradient(got)  # p times the gradient of -log p is the gradient of -p
        near(slope, gradient(-logp.exp().sum() / 10), f"gradient of {what} at the last layer", 1e-3)


# ------------------------------------------------------------------------------------------------------------
# Sheet 3: PPO.

def test_kl_estimators(m):
    import torch
    k1, k3 = several(m.kl_estimators(torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])),
                     ("k1", "k3"))
    near(k1, [0.5, -1.0, 0.0], "k1 of logp [-1, -2, -.5] and ref_logp [-1.5, -1, -.5]")
    near(k3, [math.exp(-0.5) - 0.5, math.e - 2, 0.0], "k3 of the same")
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    means = [(p * k).sum() for k in m.kl_estimators(p.log(), q.log())]
    near(torch.stack(means), [0.3600617, 0.3600617], "the means of k1 and k3 under pi, both KL(pi || ref)")


def test_token_rewards(m):
    import torch
    from eval import Segment
    s = Segment([7] * 9, [0, 0, 1, 1, 1, 0, 0, 1, 1], [0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 5.0])
    s.logp = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0])
    s.ref_logp = torch.tensor([-1.5, -1.0, -0.5, -3.5, -3.0])

    def only_k1(logp, ref_logp):
        return logp - ref_logp, torch.full_like(logp, 9.0)
    with mock.patch.object(m, "kl_estimators", only_k1):
        near(m.token_rewards(s, 1.0, 0.0), [0, 0, -1, 0, 5], "rewards at scale 1, beta 0")
        near(m.token_rewards(s, 5.0, 0.0), [0, 0, -0.2, 0, 1], "rewards at scale 5, beta 0")
        near(m.token_rewards(s, 5.0, 0.1), [-0.05, 0.1, -0.2, -0.05, 0.8], "rewards at scale 5, beta .1, "
             "k1 [.5, -1, 0, .5, 2]")
        s.reward = [0.0] * 9
        near(m.token_rewards(s, 5.0, 1.0), [-0.5, 1, 0, -0.5, -2], "rewards of worthless answers, beta 1")


def test_answer_discounts(m):
    from eval import Segment
    for action, expected in (([0, 0, 1, 1, 1, 0, 0, 1, 1], [1, 1, 0.5, 1, 0.5]), ([0, 1], [0.5]),
                             ([0, 1, 1, 0, 0], [1, 0.5]), ([0, 1, 0, 1], [0.5, 0.5]),
                             ([0, 0, 1, 1, 0, 1, 1, 1], [1, 0.5, 1, 1, 0.5])):
        s = Segment([7] * len(action), list(action), [0.0] * len(action))
        near(m.answer_discounts(s, 0.5), expected, f"discounts behind mask {action}, gamma .5")
        equal(s.action_mask, action, "the segment's action_mask after the call")
    near(m.answer_discounts(s, 1.0), [1] * 5, "discounts at gamma 1")


def test_gae(m):
    import torch
    for rewards, values, discounts, lam, expected, what in (
            ([0, 0, 1], [0, 0, 0], [1, 1, 1], 1.0, [1, 1, 1], "lambda 1, values 0"),
            ([0, 0, 1], [0, 0, 0], [1, 1, 1], 0.5, [0.25, 0.5, 1], "lambda .5, values 0"),
            ([0, 0, 1], [0.5, 0.25, 0.75], [1, 1, 1], 0.0, [-0.25, 0.5, 0.25], "lambda 0: the deltas"),
            ([0, 0, 1], [0.5, 0.25, 0.75], [1, 1, 1], 1.0, [0.5, 0.75, 0.25], "lambda 1"),
            ([1], [0.25], [0.5], 0.9, [0.75], "one token"),
            ([0, -1, 0, 2], [0.5, 1, -0.5, 1], [1, 0.5, 1, 0.5], 0.5,
             [-0.375, -1.75, 2.0, 1.0], "a discount of .5 behind tokens 1 and 3, lambda .5")):
        tensors = [torch.tensor(x, dtype=torch.float32) for x in (rewards, values, discounts)]
        copies = [x.clone() for x in tensors]
        advantages, returns = several(m.gae(*tensors, lam), ("advantages", "returns"))
        what = f"{what}; rewards {rewards}, values {values}, discounts {discounts}"
        near(advantages, expected, f"advantages, {what}")
        near(returns, [a + v for a, v in zip(expected, values)], f"returns, {what}")
        equal(all(map(torch.equal, tensors, copies)), True, "are the arguments unchanged")
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 60, generator=generator).double()
    ahead = [sum(rewards[t:].tolist()) for t in range(60)]
    near(m.gae(rewards, values, torch.ones(60).double(), 1.0)[1], ahead, "returns of 60 tokens, lambda 1")


def test_estimate_advantages(m):
    import torch
    from eval import Segment
    asked = []
    rewards = [[0.0, -1.0], [0.0, 0.5, 2.0], [4.0]]      # of three conversations, from the stub
    values = [[0.1, 0.2], [0.3, 0.4, 0.5], [0.6]]
    segments = []
    for i, of_tokens in enumerate(values):
        n = len(of_tokens)
        segments.append(Segment([i] * (n + 1), [0] + [1] * n, [0.0] * (n + 1)))
        segments[-1].value, segments[-1].logp = torch.tensor(of_tokens), torch.zeros(n)
        segments[-1].ref_logp = torch.zeros(n)

    def token_rewards(segment, reward_scale, beta):
        asked.append(("token_rewards", segment.ids[0], reward_scale, beta))
        return torch.tensor(rewards[segment.ids[0]])

    def answer_discounts(segment, gamma):
        asked.append(("answer_discounts", segment.ids[0], gamma))
        return torch.tensor([1.0] * (len(segment.ids) - 2) + [0.5])

    def gae(rewards, values, discounts, lam):  # not GAE: the sum of all later rewards
        asked.append(("gae", [round(v, 3) for v in values.tolist()], discounts.tolist(), lam))
        total = rewards.flip(0).cumsum(0).flip(0)
        return total, total + values
    stubs = dict(token_rewards=token_rewards, answer_discounts=answer_discounts, gae=gae)
    with mock.patch.multiple(m, **stubs):
        m.estimate_advantages(SimpleNamespace(segments=segments), 5.0, 0.02, 0.9, 0.8)
    equal([call for call in asked if call[0] == "gae"],
          [("gae", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1.0, 0.5, 1.0, 1.0, 0.5, 0.5], 0.8)],
          "the calls of gae(): values, discounts, lam")
    equal(sorted(call for call in asked if call[0] == "token_rewards"),
          [("token_rewards", i, 5.0, 0.02) for i in range(3)], "the calls of token_rewards()")
    equal(sorted(call for call in asked if call[0] == "answer_discounts"),
          [("answer_discounts", i, 0.9) for i in range(3)], "the calls of answer_discounts()")
    for i, expected in enumerate(([5.5, 5.5], [6.5, 6.5, 6.0], [4.0])):
        near(segments[i].advantage, expected, f".advantage of conversation {i}, from a stub for gae()")
        returns = [a + v for a, v in zip(expected, values[i])]
        near(segments[i].returns, returns, f".returns of conversation {i}")


def test_whiten(m):
    import torch
    machine = one_process()
    near(m.whiten(torch.tensor([1.0, 2.0, 3.0, 6.0]), machine), [-1.069045, -0.534522, 0.0, 1.603567],
         "whitened [1, 2, 3, 6]", 1e-3)
    near(m.whiten(torch.full((5,), 2.0), machine), [0] * 5, "whitened [2, 2, 2, 2, 2]")
    barrier, given, results = threading.Barrier(2, timeout=10), [None, None], [None, None]

    def all_sum(values, machine):  # two ranks are two threads that wait for each other
        given[machine.rank] = list(values)
        barrier.wait()
        total = [float(a + b) for a, b in zip(*given)]
        barrier.wait()
        return total

    def rank(i, numbers):
        here = SimpleNamespace(rank=i, world=2, device=torch.device("cpu"))
        results[i] = m.whiten(torch.tensor(numbers), here)
    with mock.patch.object(m, "all_sum", all_sum):
        threads = [threading.Thread(target=rank, args=pair, daemon=True)
                   for pair in ((0, [1.0]), (1, [2.0, 3.0, 6.0]))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert None not in results, "two ranks: expected a result on each, got none (do both call all_sum()?)"
    near(torch.cat(results), [-1.069045, -0.534522, 0.0, 1.603567], "[1] and [2, 3, 6] on two ranks", 1e-3)


def test_policy_loss(m):
    import torch
    for ratio, advantage, loss, slope in (
            (1.0, 2.0, -2.0, -2.0), (1.5, 1.0, -1.2, 0.0), (1.5, -1.0, 1.5, 1.5), (0.5, 1.0, -0.5, -0.5),
            (0.5, -1.0, 0.8, 0.0), (1.1, 1.0, -1.1, -1.1)):
        logp = torch.tensor([math.log(ratio) - 3], requires_grad=True)
        got = m.policy_loss(logp, torch.tensor([-3.0]), torch.tensor([advantage]), 0.2)
        what = f"ratio {ratio}, advantage {advantage}, clip .2"
        near(got, [loss], f"loss at {what}")
        assert got.requires_grad, "loss: expected a gradient to logp, got none"
        got.sum().backward()
        near(logp.grad, [slope], f"gradient of logp at {what}")
    got = m.policy_loss(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 3.0]), 0.1)
    near(got, [-1.0, -3.0], "losses of two tokens: one number each")


def test_value_loss(m):
    import torch
    for value, old, target, clip, loss, slope in (
            (1.0, 0.0, 1.0, 0.2, 0.32, 0.0), (1.0, 0.0, -1.0, 0.2, 2.0, 2.0),
            (0.1, 0.0, 1.0, 0.2, 0.405, -0.9), (-1.0, 0.0, -1.0, 0.2, 0.32, 0.0),
            (3.0, 2.0, 3.0, 0.5, 0.125, 0.0), (2.0, 2.0, 2.0, 0.5, 0.0, 0.0), (0.5, 0.0, 1.5, 0.2, 0.845, 0.0)):
        values = torch.tensor([value], requires_grad=True)
        got = m.value_loss(values, torch.tensor([old]), torch.tensor([target]), clip)
        what = f"value {value}, old value {old}, return {target}, clip {clip}"
        near(got, [loss], f"loss of {what}")
        assert got.requires_grad, "loss: expected a gradient to the values, got none"
        got.sum().backward()
        near(values.grad, [slope], f"gradient of the value at {what}")
    got = m.value_loss(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), 0.2)
    near(got, [0.5, 0.0], "losses of two tokens: one number each")


def test_group_baseline(m):
    import torch
    for rewards, groups, expected in (([1.0, 0.0, 0.5, 0.5], [0, 0, 1, 1], [0.5, -0.5, 0.0, 0.0]),
                                      ([1.0, 0.0, 4.0, 2.0], [3, 7, 3, 7], [-1.5, -1.0, 1.5, 1.0]),
                                      ([5.0, 5.0, 2.0], [1, 1, 1], [1.0, 1.0, -2.0]),
                                      ([5.0], [0], [0.0])):
        got = m.group_baseline(torch.tensor(rewards), torch.tensor(groups))
        near(got, expected, f"advantages of rewards {rewards} in groups {groups}")


# The update runs in train() itself, on a policy whose gradient is known without autograd: each action token
# has a weight of its own, and its log-probability is that weight / temperature. The reference has other weights.

SIZES = [1, 2, 1, 3, 2, 1, 4, 2]          # action tokens of eight conversations: token i is weight i
ADVANTAGES = [3, -2, 1, 2, -3, 1, -1, 4, 2, -4, 1, -2, 3, -1, 2, -3]
RETURNS = [1, 0, -1, 2, 1, 0, 1, -1, 2, 0, 1, 1, -2, 0, 1, 2]
TRUNK = [1, -1, 2, 0, 1, 1, -2, 1, 0, 2, -1, 1, 1, 0, -1, 2]     # what the value head reads: V = a TRUNK + b


def update_run(m, advantage=3.0, ranks=1, others=None, dtype="float32", drift=(), broken=0, noise=0, **flags):
    """One iteration of train() with stubs for all other parts -> namespace. minibatches: the action tokens of
    each step. passes: conversations and tokens of each forward pass with a gradient. backward: for each step
    the number of backward passes, and of the parts that micro_batches() gives. head: a and b. record: the
    log's. others: what all_sum() multiplies by: (all 16 tokens' count, other numbers); None: all by ranks.
    drift: {token: what its log-prob changes by before the first step}. broken: how many forward passes have a
    gradient that is not finite. noise: seed of random's own generator."""
    import random
    import torch
    from eval import Episode, Segment
    args = SimpleNamespace(**{**dict(
        lr=1.0, value_rate=2.0, gamma=1.0, lam=1.0, beta=0.0, temperature=0.5, epochs=1, minibatches=1,
        target_kl=1e9, clip=0.2, clip_value=0.5, coef_value=0.1, coef_entropy=0.05, decay=0, tokens=1e6,
        steps=1, batch=4, micro_tokens=10 ** 6, max_new_tokens=4, evaluations=0, saves=0, seed=0, init="",
        rule="id", vl=False, activation_checkpointing=False, folder=""), **flags})
    machine = SimpleNamespace(device=torch.device("cpu"), dtype=getattr(torch, dtype), rank=1, world=ranks,
                              amp=contextlib.nullcontext)  # rank 1 writes no file
    segments, token = [], 0
    for i, size in enumerate(SIZES):
        prompt = [0] * (1 + i % 3)
        segments.append(Segment(prompt + list(range(token, token + size)), prompt + [1] * size))
        token += size
    others = others or (ranks, ranks)
    run = SimpleNamespace(args=args, ranks=ranks, others=others, advantage=advantage, minibatches=[], passes=[],
                          backward=[], updating=False, tokens=sum(len(s.ids) for s in segments))
    started, whitened = -torch.arange(1.0, 17) / 8, advantage * (torch.tensor(ADVANTAGES) - 0.25)
    moved = torch.tensor([float(dict(drift).get(i, 0)) for i in range(16)])

    def actions(segment):
        return [i for i, action in zip(segment.ids, segment.action_mask) if action]

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.dropout = torch.nn.Parameter(started.clone()), torch.nn.Dropout(0.5)

        def get_output_embeddings(self):
            return SimpleNamespace(in_features=1)
    policy, head, scored, seen, backward = Policy().eval(), [], [], [], []
    last = [None]  # the tokens of the last forward pass

    def score(model, segments, pad_id, machine, temperature=1.0, value_head=None, entropy_grad=True):
        ids = torch.tensor(sum(map(actions, segments), []))
        if run.updating:
            equal(temperature, args.temperature, "the temperature that score() was given, with --temperature 0.5")
            equal(model.training, False, "is the policy in train mode (dropout) in score()")
        last[0] = ids
        weights = model.dropout(model.weight)[ids]
        logp, entropy = weights / temperature, 3 * weights
        if run.updating and not run.minibatches:
            logp = logp + moved[ids]
        if torch.is_grad_enabled():
            logp.register_hook(lambda gradient: backward.append(len(gradient)))
            scored.extend(segments)
            run.passes.append((len(segments), len(segments) * max(len(s.ids) for s in segments)))
            if len(seen) < broken:
                logp.register_hook(lambda gradient: gradient * math.inf)
            seen.append(ids)
        value = None
        if value_head is not None:
            head[:] = [value_head]
            value = value_head(torch.tensor(TRUNK, dtype=torch.float32)[ids, None])[:, 0]
        return logp, entropy if entropy_grad else entropy.detach(), value

    class Plain(torch.optim.SGD):  # Adam's first step hides the gradient's size
        def __init__(self, groups, lr, **_):
            super().__init__(groups, lr=lr)

        def step(self, closure=None):
            minibatch = [s for s in segments if any(s is x for x in scored)]
            assert minibatch, "optimizer.step(): expected score() with gradients before it, got no such call"
            run.minibatches.append(sum(map(actions, minibatch), []))
            run.backward.append((len(backward), len(micro_batches(minibatch, args.micro_tokens, machine))))
            scored.clear(), backward.clear()
            return super().step()

    def estimate_advantages(episode, *_):
        for s in episode.segments:
            s.advantage = torch.tensor([float(ADVANTAGES[i]) for i in actions(s)])
            s.returns = torch.tensor([float(RETURNS[i]) for i in actions(s)])

    def whiten(x, machine):
        run.updating = True  # what comes next
        return advantage * (x - 0.25)

    def given(function, name, x, field, of_tokens):
        """An argument must be the field of the conversations of the last forward pass, by tokens."""
        if len(x) == len(last[0]):  # else the student has another order, and the weights say more
            near(x, torch.as_tensor(of_tokens, dtype=torch.float32)[last[0]],
                 f"the {name} that {function}() was given, .{field} of the part's tokens {last[0].tolist()}")

    def policy_loss(logp, old_logp, advantages, clip):
        equal(clip, args.clip, f"the clip that policy_loss() was given, with --clip {args.clip}")
        given("policy_loss", "old_logp", old_logp, "logp", started / args.temperature)
        given("policy_loss", "advantages", advantages, "whitened", whitened)
        return -advantages * (logp - old_logp).exp()

    def value_loss(values, old_values, returns, clip):
        equal(clip, 0.5, "the clip that value_loss() was given, with --clip_value 0.5")
        given("value_loss", "old_values", old_values, "value", [0] * 16)
        given("value_loss", "returns", returns, "returns", RETURNS)
        return 0.5 * (values - returns).square() + (values - old_values).square()

    def kl_estimators(logp, ref_logp):
        k1 = logp - ref_logp
        return k1, torch.where(k1 > 0, k1, -5 * k1)

    def micro_batches(segments, budget, machine):
        from sft import micro_batches
        parts = micro_batches(segments, budget, SimpleNamespace(world=1))
        return parts + [(parts[0][0], 0.0)] * (ranks > 1)  # as on a rank with fewer of them than another

    def load_model(path, args, machine, trained=True):
        model = policy if trained else copy.deepcopy(policy)
        if not trained:
            model.weight.data += torch.linspace(-0.5, 0.4, 16)
        return model, SimpleNamespace(pad_token_id=0)

    def all_sum(values, machine):
        return [float(v) * others[0 if float(v) == 16 else 1] for v in values]

    def keep(name):
        return lambda *arguments: setattr(run, name, arguments)
    turn = dict(reward=0.0, position_solved=False, position_done=True, cut=False, verdict="wrong")
    episodes = [Episode(segments[i:i + 2], [turn], 0) for i in range(0, 8, 2)]
    env = SimpleNamespace(reward_scale=1.0, verdicts=["wrong"])
    state = {"step": 0, "flops": 0.0, "start_flops": 0.0, "scaler": {}}
    stubs = dict(
        score=score, estimate_advantages=estimate_advantages, policy_loss=policy_loss, value_loss=value_loss,
        kl_estimators=kl_estimators, micro_batches=micro_batches, load_model=load_model,
        whiten=whiten, rollout=lambda *_: episodes, check_model=lambda *_: None,
        all_sum=all_sum, all_mean=lambda means, machine: means, make=lambda *_, **__: env,
        shard=lambda model, *_: model, load_checkpoint=lambda *_: ("", state, {}),
        save_checkpoint=keep("saved"), log=keep("logged"), open_run=lambda *_: mock.Mock(n=0))
    random.seed(noise)
    with mock.patch.multiple(m, **stubs), mock.patch.object(torch.optim, "AdamW", Plain):
        try:
            m.train(args, machine, threading.Event())
            run.stopped = ""
        except SystemExit as error:
            run.stopped = str(error)
    run.weights = policy.weight.detach().clone()
    run.head = [x.item() for x in (head[0].weight, head[0].bias)]
    if not run.stopped:
        run.record, run.scale = run.logged[2], run.saved[4]["scaler"].get("scale")
    return run


def by_hand(run):
    """The weights after steps on a run's minibatches, a and b, and what is logged: means over the steps."""
    args, weights, a, b = run.args, [-(i + 1) / 8 for i in range(16)], 0.0, 0.0
    old, log = [w / args.temperature for w in weights], []
    for tokens in run.minibatches:
        everywhere = len(tokens) * run.others[0]         # the action tokens of all ranks
        count = everywhere / run.others[1]               # sums are those of this rank, times others[1]
        change = {i: weights[i] / args.temperature - old[i] for i in tokens}
        ratio = {i: math.exp(change[i]) for i in tokens}
        pull = {i: run.advantage * (ADVANTAGES[i] - 0.25) * ratio[i] for i in tokens}
        value = {i: a * TRUNK[i] + b for i in tokens}                               # the old ones are 0
        error = {i: value[i] - RETURNS[i] + 2 * value[i] for i in tokens}
        log.append({
            "policy_loss": sum(-pull[i] for i in tokens) / count,
            "value_loss": sum(0.5 * (value[i] - RETURNS[i]) ** 2 + value[i] ** 2 for i in tokens) / count,
            "entropy": sum(3 * weights[i] for i in tokens) / count,
            "approx_kl": sum(-change[i] if change[i] < 0 else 5 * change[i] for i in tokens) / count,
            "abs_log_ratio": sum(abs(change[i]) for i in tokens) / count,
            "clip_fraction": sum(abs(ratio[i] - 1) > args.clip for i in tokens) / count})
        gradient = [0.0] * 18
        for i in tokens:
            gradient[i] = (-pull[i] / args.temperature - 3 * args.coef_entropy) / everywhere
            for place, slope in ((16, TRUNK[i]), (17, 1)):
                gradient[place] += args.coef_value * error[i] * slope / everywhere
        norm = math.sqrt(sum(g * g for g in gradient))
        log[-1]["grad_norm"] = norm
        gradient = [g * min(1, 1 / max(norm, 1e-9)) for g in gradient]
        weights = [w - args.lr * g for w, g in zip(weights, gradient)]
        a, b = (x - args.lr * args.value_rate * g for x, g in zip((a, b), gradient[16:]))
    return weights, [a, b], {name: sum(x[name] for x in log) / len(log) for name in log[0]}


def test_update(m):
    import torch
    started = -torch.arange(1.0, 17) / 8

    def went(what, steps, **settings):
        """A run that must come to its end after so many steps. Each must be the one that by_hand() takes."""
        run = update_run(m, **settings)
        assert not run.stopped, f"{what}: expected an iteration without an error, got {run.stopped!r}"
        equal(len(run.minibatches), steps, f"{what}: optimizer steps" + ", no step was taken" * (not run.minibatches))
        weights, head, log = by_hand(run)
        after = f"{what}: after {steps} step{'s' * (steps > 1)} of plain gradient descent"
        move, expected = run.weights - started, torch.tensor(weights) - started
        assert move.any(), f"{after}: expected other weights of the policy, got the old ones: its gradient was 0"
        share = (move / expected)[expected.abs() > 1e-4]
        if steps == 1 and (share - share[0]).abs().max() < 1e-3:  # a wrong weight, sign or count
            near(share[0], torch.tensor(1.0), f"{after}: how far the policy's weights went, as a multiple of what is "
                 "right", 1e-3)
        near(run.weights, weights, f"{after}, the policy's weights", 1e-6)
        near(torch.tensor(run.head), head, f"{after}, the value head's weights", 1e-6)
        equal(run.record["updates"], steps, f"{what}: updates")
        for name, expected in log.items():
            assert name in run.record, f"{what}: {name} in the log: expected {expected:.6g}, got nothing"
            near(run.record[name], expected, f"{what}: {name} in the log, the mean over the steps", 1e-4)
        near(run.record["ratio_error"], 0.0,
             f"{what}: ratio_error, which is measured only before the first step", 1e-6)
        for i, (got, parts) in enumerate(run.backward if run.ranks > 1 else []):
            assert got >= parts, (f"{what}: backward passes before step {i + 1}: expected {parts}, one for each part "
                                  f"that micro_batches() gives, also for that with weight 0, got {got}")
        return run

    def trained(run):
        """FLOP in the log: for each of 16 weights 6 a trained token, and 2 a token that is scored twice."""
        return (run.record["flops"] / 16 / run.ranks - 4 * run.tokens) / 6

    def fails(what, **settings):
        run = update_run(m, **settings)
        assert run.stopped and not run.minibatches, (
            f"{what}: expected fail() before a step, got {len(run.minibatches)} steps and "
            f"{run.stopped or 'no error'!r}")

    def goes_on(what, **settings):
        run = update_run(m, **settings)
        assert not run.stopped, f"{what}: expected no error, got {run.stopped!r}"
        return run
    # One step on all tokens, in one part. One term of the loss after the other.
    for terms, coefficients in (("policy loss only", (0.0, 0.0)), ("policy and value loss", (0.1, 0.0)),
                                ("policy loss and entropy bonus", (0.0, 0.05)), ("all three terms", (0.1, 0.05))):
        settings = dict(zip(("coef_value", "coef_entropy"), coefficients))
        flags = " ".join(f"--{name} {x:g}" for name, x in settings.items())
        went(f"{terms} ({flags}), one step on one part, gradient norm below 1", 1, advantage=0.3, **settings)
    went("all three terms, one step on one part, gradient norm above 1", 1)
    # The same, in several parts.
    for limit, (advantage, size) in product((12, 1), ((0.3, "below"), (3.0, "above"))):
        what = f"one step on several parts (--micro_tokens {limit}), gradient norm {size} 1"
        run = went(what, 1, micro_tokens=limit, advantage=advantage)
        most = max([tokens for conversations, tokens in run.passes if conversations > 1], default=0)
        assert most <= limit, (f"{what}: tokens of a forward pass of several conversations, with padding: "
                               f"expected at most {limit}, got {most}")
    # Two steps on all tokens. In the second the ratios are not 1; some are between exp(clip) and 1 + clip.
    for clip in (0.2, 0.5):
        went(f"--epochs 2 --minibatches 1 --clip {clip}, several parts", 2, epochs=2, micro_tokens=12, clip=clip,
             advantage=1.0)
    # Two epochs of five minibatches.
    what = "--epochs 2 --minibatches 5 with eight conversations"
    run = update_run(m, epochs=2, minibatches=5, lr=0.5)
    assert not run.stopped, f"{what}: expected an iteration without an error, got {run.stopped!r}"
    equal(len(run.minibatches), 10, f"{what}: optimizer steps")
    for epoch in (run.minibatches[:5], run.minibatches[5:]):
        tokens = sum(epoch, [])
        for i in range(16):
            equal(tokens.count(i), 1, f"{what}: how often action token {i} is trained in an epoch")
        equal([] in epoch, False, f"{what}: is a minibatch empty")
    run, again = (went(what, 10, epochs=2, minibatches=5, lr=0.5, noise=noise) for noise in (0, 1))
    equal(run.minibatches[:5] == run.minibatches[5:], False, f"{what}: are both epochs' minibatches the same")
    equal(run.minibatches == again.minibatches, True,
          f"{what}: has a second run with the same seed the same minibatches (rng)")
    near(trained(run), 2 * run.tokens, f"{what}: trained_tokens, by the flops in the log", 0.5)
    # The KL stop.
    what = "--epochs 3 --minibatches 1, where the KL is too large in the second epoch"
    run = went(what, 1, epochs=3, target_kl=0.01)
    near(trained(run), 2 * run.tokens, f"{what}: trained_tokens, by the flops in the log", 0.5)
    # The first ratio. Tokens 0 and 13 are in the first and in the last part.
    for (token, other), sign in product(((0, 13), (13, 0)), (1, -1)):
        where = f"before the first step, the log-prob of one token in the {'last' if token else 'first'} part"
        what = f"{where} changes by {sign * 3e-4}, of one in the {'first' if token else 'last'} part by 0.0001"
        run = goes_on(what, drift={token: sign * 3e-4, other: 1e-4}, micro_tokens=12)
        near(run.record["ratio_error"], 3e-4, f"{what}: ratio_error", 1e-5)
        fails(f"{where} changes by {sign * 0.1}, in fp32", drift={token: sign * 0.1}, micro_tokens=12)
    fails("before the first step, all log-probs change by 0.1, in fp32 with --target_kl 0.01 (ratio_error is tested "
          "before the KL)", drift=dict.fromkeys(range(16), 0.1), target_kl=0.01)
    for dtype in ("bfloat16", "float16"):
        where = f"in {dtype}, before the first step,"
        what = f"{where} all log-probs change by 0.01 (their mean may change by 0.05)"
        run = goes_on(what, dtype=dtype, drift=dict.fromkeys(range(16), 0.01))
        near(run.record["ratio_error"], 0.01, f"{what}: ratio_error", 1e-5)
        goes_on(f"{where} one of 16 log-probs changes by 0.5, so the mean |log ratio| is 0.031", dtype=dtype,
                drift={9: 0.5})
        fails(f"{where} half of the log-probs change by 0.12, the others by -0.12", dtype=dtype,
              drift={i: (-1) ** i * 0.12 for i in range(16)}, target_kl=0.01)
        for token in (0, 13):
            fails(f"{where} one of 16 log-probs, in the {'last' if token else 'first'} part, changes by 1.2, so the "
                  "mean |log ratio| is 0.075", dtype=dtype, drift={token: 1.2}, micro_tokens=12)
    # Several ranks. FSDP adds their gradients up.
    what = "one of two ranks with equal data, one part with weight 0"
    run = went(what, 4, ranks=2, epochs=2, minibatches=2, micro_tokens=12)
    near(trained(run), 2 * run.tokens, f"{what}: trained_tokens, this rank's, by the flops in the log", 0.5)
    run = goes_on(what, ranks=2, drift={13: 3e-4}, micro_tokens=12)
    near(run.record["ratio_error"], 3e-4, f"{what}: ratio_error, this rank's", 1e-5)
    unequal = dict(ranks=2, others=(3, 2), epochs=2, advantage=1.0)
    what = "one of two ranks, of which the other one has twice as many tokens"
    run = went(what, 2, **unequal)
    kl = 2 * run.record["approx_kl"]  # of the second minibatch; that of the first is 0
    for share, steps in ((0.75, 1), (1.25, 2)):  # this rank's sum over all ranks' count: 0.5; over its own: 1.5
        went(f"{what}, approx_kl in the second epoch is {1 / share:.3g} times --target_kl", steps, **unequal,
             target_kl=share * kl)
    # Gradients that are not finite.
    what = "the first gradient is not finite"
    try:
        run = update_run(m, broken=1, epochs=2)
    except RuntimeError as error:  # of clip_grad_norm_(..., error_if_nonfinite=True)
        if "non-finite" not in str(error):
            raise
    else:
        finite = run.weights.isfinite().all().item() and len(run.minibatches) <= 1
        assert finite, f"{what}: expected no step on it, got {len(run.minibatches)} steps in 2 epochs"
    went("fp16 with its loss scaler", 1, dtype="float16")
    run = went(f"fp16, {what}, --epochs 2", 1, dtype="float16", broken=1, epochs=2)
    equal(run.scale, 2.0 ** 15, f"fp16, {what}: the loss scale in the end; it was 65536")


# ------------------------------------------------------------------------------------------------------------
# The table. added: the repository does not have this function, and a student adds it to the file. block: not
# a function but a part of one: its name, and the beginnings of the two banners around the part.

Exercise = namedtuple("Exercise", "name sheet file points test added block", defaults=(False, None))
EXERCISES = {exercise.name: exercise for exercise in (
    Exercise("relative_word", 1, "verifier.py", 5, test_relative_word),
    Exercise("judge_gp", 1, "verifier.py", 10, test_judge_gp),
    Exercise("solutions", 1, "env_gp.py", 10, test_solutions),
    Exercise("GeneralPoints.step", 1, "env_gp.py", 10, test_step),
    Exercise("Segment.add", 2, "eval.py", 5, test_segment_add),
    Exercise("glue_ids", 2, "eval.py", 10, test_glue_ids),
    Exercise("forward", 2, "eval.py", 10, test_forward),
    Exercise("score", 2, "eval.py", 10, test_score),
    Exercise("sft_loss", 2, "sft.py", 5, test_sft_loss),
    Exercise("dft_loss", 2, "sft.py", 5, test_dft_loss, added=True),
    Exercise("kl_estimators", 3, "rl.py", 5, test_kl_estimators),
    Exercise("token_rewards", 3, "rl.py", 10, test_token_rewards),
    Exercise("answer_discounts", 3, "rl.py", 5, test_answer_discounts),
    Exercise("gae", 3, "rl.py", 15, test_gae),
    Exercise("estimate_advantages", 3, "rl.py", 10, test_estimate_advantages),
    Exercise("whiten", 3, "rl.py", 5, test_whiten),
    Exercise("policy_loss", 3, "rl.py", 10, test_policy_loss),
    Exercise("value_loss", 3, "rl.py", 5, test_value_loss),
    Exercise("update", 3, "rl.py", 30, test_update, block=("train", "# ==== UPDATE", "# ==== LOG")),
    Exercise("group_baseline", 3, "rl.py", 5, test_group_baseline, added=True))}


def complaint(error, file):
    """One line about what went wrong -> str. file: the student's; the traceback's last line in it is
    shown."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and os.path.basename(frames[-1].filename) == "exercises.py":
        return str(error)
    if isinstance(error, NotImplementedError):
        return f"not done yet: {error}"
    lines = [frame.line for frame in frames if os.path.basename(frame.filename) == file]
    return f"{type(error).__name__}: {error}".splitlines()[0] + (f", at `{lines[-1]}`" if lines else "")


class Tail(io.TextIOBase):
    """A stdout that keeps the last 2,000 characters: a loop that prints for a minute fills no memory."""
    text = ""

    def write(self, text):
        self.text = (self.text + text)[-2000:]
        return len(text)


def main(name):
    """Run one test in this process and write the verdict. make.py calls this in a separate process and sends
    the name of the verdict's file through a pipe. Only that file counts, so an exit is not a pass."""
    file, exercise, printed = sys.stdin.readline().strip(), EXERCISES[name], Tail()
    why, passed = "", False
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exercise.test(importlib.import_module(exercise.file.removesuffix(".py")))
            passed = True
        except BaseException as error:  # also SystemExit: it fails this exercise and does not end the grading
            why = complaint(error, exercise.file)
    with open(file, "w") as f:
        json.dump({"passed": passed, "why": why, "printed": printed.text}, f)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
