"""test_all.py: every claim about correctness, as a test.

    python test_all.py                    # all, three minutes on two cores; last line "N passed, N failed"
    python test_all.py gae whiten         # those whose name contains gae or whiten
    pytest test_all.py                    # the same, if you have pytest

No test downloads anything: real model classes are tested through tiny random checkpoints that the test saves.
No test asks how long something took.
"""
import atexit
import contextlib
import copy
import faulthandler
import functools
import gc
import glob
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers.cache_utils import DynamicLayer

import env_gp
import env_virl
import eval as ev
import rl
import sft
from env_gp import RULES, GeneralPoints, all_hands, solutions
from env_virl import VIRL, shorthand
from verifier import (COMPASS, GP_FEEDBACK, GP_REWARD, RELATIVE, VIRL_FEEDBACK, VIRL_REWARD, FormulaError,
                      Step, compass_word, evaluate_formula, judge_gp, judge_virl, last_json_object,
                      relative_word)

HERE = os.path.dirname(os.path.abspath(__file__))


# ------------------------------------------------------------------------------------------------------------
# Helpers: what is compared.

def equal(actual, expected, what=""):
    if actual != expected:
        raise AssertionError(f"{what or 'value'}: expected {expected!r}, got {actual!r}")


def near(actual, expected, tol=1e-5, what=""):
    """Numbers, lists of numbers or tensors, equal to within tol, absolute or relative."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    if a.shape != b.shape or not torch.allclose(a, b, atol=tol, rtol=tol):
        a, b = (x.tolist() if x.numel() < 6 else f"{x.flatten()[:5].tolist()} ..." for x in (a, b))
        raise AssertionError(f"{what or 'value'}: expected {b}, got {a}, tolerance {tol:g}")


def within(low, actual, high, what="value"):
    assert low <= actual <= high, f"{what}: expected {low} to {high}, got {actual}"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def raises(kind, words, function):
    """function() must raise `kind` with `words` in its message -> the message."""
    try:
        function()
    except kind as e:
        assert words in str(e), f"expected {words!r} in the error, got {str(e)!r}"
        return str(e)
    raise AssertionError(f"expected {kind.__name__} about {words!r}, got none")


def refused(words, function):
    """function() must raise a ValueError of one short line with these words."""
    message = raises(ValueError, words, function)
    assert "\n" not in message and len(message) < 500, f"expected one short line, got {message}"


# Helpers: folders and files.

@contextlib.contextmanager
def folder(init=False):
    """A folder for a while. init: with a copy of small_init()."""
    with tempfile.TemporaryDirectory() as path:
        if init:
            shutil.copytree(small_init(), path, dirs_exist_ok=True)
        yield path


def put(path, name, content):
    """Write a file. content: bytes, None for no file."""
    file = os.path.join(path, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    if content is not None:
        with open(file, "wb") as f:
            f.write(content)
    elif os.path.exists(file):
        os.remove(file)


def tree(path):
    """All files below a folder -> {path: hash of the bytes}."""
    found = {}
    for place, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(place, name), "rb") as f:
                found[os.path.join(place, name)] = hash(f.read())
    return found


def save(path, model, tok, /, **args):
    """Write a model's folder, as a user brings it. args: flags of the finished run that it shall be."""
    if args:
        os.makedirs(path, exist_ok=True)
        ev.write_json(f"{path}/args.json", args)
        state = {"step": 1, "flops": 0.0, "world": 1, "done": True}
        sft.save_checkpoint(path, model, tok, cpu(), state, {})
    else:
        model.save_pretrained(path)
        (tok.processor if callable(tok.processor) else tok).save_pretrained(path)


def weights(path):
    return {k: v.clone() for k, v in ev.load(path)[0].state_dict().items()}


def state_of(path):
    """state.json of a run's newest checkpoint."""
    return ev.read_json(os.path.join(ev.checkpoint_at(path), "state.json"))


def records(path, key=""):
    """metrics.jsonl of a run: the records that have this key."""
    with open(os.path.join(path, "metrics.jsonl")) as f:
        return [r for r in map(json.loads, f) if not key or key in r]


# Helpers: scripts. A command line is a str, as it is typed.

SMALL = "--evaluations 1 --episodes 6 --max_new_tokens 24 --seed 3 --verify 2"
sft.EVERY["eval_episodes"] = 4


def flags(out, steps=1, batch=4, tokens="1e9", **more):
    """A small run's flags, then more of them. None: without this one. True: a flag without a value."""
    named = {"out": out, "tokens": tokens, "batch": batch, "steps": steps, **more}
    return SMALL + "".join(f" --{name}" + f" {value}" * (value is not True)
                           for name, value in named.items() if value is not None)


def printed(function, *arguments):
    """-> what the call printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*arguments)
    return out.getvalue()


def quiet(main, line):
    """Run a script's main() in this process -> what it printed. Exits count as exceptions."""
    return printed(main, line.split())


def quick(main, line):
    """quiet(), but evaluations and tables show a player who knows nothing: for tests of what is trained."""
    with acting(lambda env, seed: "{}"):
        return quiet(main, line)


def error_of(words, main, line):
    """On bad input a script ends in one line with these words (a pattern): exit code 1, or argparse's 2."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = raises(SystemExit, "", lambda: quiet(main, line))
    text, form = (err.getvalue(), "usage: .*\n.*: (error: .*)") if code == "2" else (code, "(error: .*)")
    said = re.fullmatch(form, text.strip())
    assert said and re.search(words, said[1]), f"expected one line about {words!r} for {line}, got {text!r}"


def command(*argv, code=0, **env):
    """Run `python ...` in a process of its own -> its output."""
    done = subprocess.run([sys.executable, *argv], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, **env}, timeout=600)  # for ranks that wait for ever
    assert done.returncode == code, f"{argv}: exit {done.returncode}\n" + (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def parsed(line=""):
    """The flags that all scripts share -> namespace."""
    return ev.parse(ev.new_parser(""), line.split())


def tiny_stages():
    """Within, a base and an init that are built on the way hardly train."""
    stages = contextlib.ExitStack()
    for table, tokens in ((sft.BASE, 2e3), (sft.INIT, 1e3), (sft.REAL_INIT, 1e3)):
        stages.enter_context(mock.patch.dict(table, tokens=tokens, batch=4, evaluations=1))
    return stages


@functools.lru_cache(maxsize=None)
def small_init():
    """An out/ folder with a hardly trained base and init, made once for all tests that need one."""
    out = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, out, True)
    for stage, tokens in (("base", 6e4), ("init", 1e4)):
        quiet(sft.main, f"{SMALL} --stage {stage} --tokens {tokens} --out {out}")
    return out


# Helpers: stand-ins for a model, and a look at calls.

@contextlib.contextmanager
def watching(owner, name, look):
    """Within, look(result, *arguments) is called after each call of owner.name."""
    real = getattr(owner, name)

    def watched(*arguments, **keywords):
        result = real(*arguments, **keywords)
        look(result, *arguments, **keywords)
        return result
    with mock.patch.object(owner, name, watched):
        yield


@contextlib.contextmanager
def acting(choose):
    """Within, evaluate() watches a player that answers choose(env, seed), without a model."""
    def play(env, seed):
        messages, turns = env.reset(seed)[0], []
        while messages:
            step = env.step(choose(env, seed))
            messages = step.messages
            turns.append(step.info)
        return ev.Episode([], turns)
    rollout = lambda model, tok, envs, seeds, *_, **__: list(map(play, envs, seeds))
    with mock.patch.object(ev, "rollout", rollout):
        yield


@contextlib.contextmanager
def speaking(model, tok, envs, choose):
    """Within, generate() says choose(env) in place of a sample, for each environment that still plays."""
    playing = list(envs)

    def generate(self, input_ids=None, **kw):
        said = [torch.tensor(ids_of(tok, choose(env)) + [tok.eos_token_id]) for env in playing]
        said = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=tok.pad_token_id)
        return SimpleNamespace(sequences=torch.cat([input_ids, said], 1), cache=None)
    with mock.patch.object(type(model), "generate", generate), \
            mock.patch.object(model.generation_config, "eos_token_id", [tok.eos_token_id]), \
            watching(type(envs[0]), "step", lambda step, env, _: step.done and playing.remove(env)):
        yield


# Helpers: models, and episodes that they play. A family is a tiny model's class and the task it plays here.

PICTURES = ("llava", "mllama", "idefics3", "qwen2_5_vl")
FAMILIES = ("gp", "virl", *PICTURES)


def cpu(dtype="fp32"):
    return ev.setup(SimpleNamespace(device="cpu", dtype=dtype))


def ids_of(tok, text):
    return tok(text, add_special_tokens=False).input_ids


@functools.lru_cache(maxsize=None)
def tiny(family="gp"):
    """A random tiny model whose samples vary, and its tokenizer. Those that see were saved and loaded."""
    model, tok = tiny_vlm(family) if family in PICTURES else sft.build_tiny(
        family if family in ev.ENVS else "gp", seed=0)
    if family == "gpt_neo":  # half of its layers have a window, in an ordinary cache
        model = hf.GPTNeoForCausalLM(hf.GPTNeoConfig(
            vocab_size=len(tok), hidden_size=32, num_layers=2, num_heads=2, window_size=16,
            attention_types=[[["global", "local"], 1]]))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5 if p.ndim == 2 else 1.0)
    # Several end tokens, as real models have: with 30 of 512 most random answers end by themselves, not all.
    model.generation_config.eos_token_id = [tok.eos_token_id, *range(300, 330)]
    model.generation_config.pad_token_id = tok.pad_token_id
    if family not in PICTURES:
        return model.eval(), tok
    with folder() as path:
        save(f"{path}/m", model, tok)
        loaded, tok = ev.load(f"{path}/m")
    assert type(loaded) is type(model) and same(model.state_dict(), loaded.state_dict())
    if family == "qwen2_5_vl":  # without torchvision there is a reason in the processor's place
        if isinstance(tok.processor, str):
            shown = GeneralPoints(vl=True).reset(0)
            raises(SystemExit, "processor cannot be loaded", lambda: ev.prompt(tok, *shown))
        tok.processor = qwen_processor(tok)
    return loaded, tok


def world(family, i, verify):
    """The environment of a family's episode number i."""
    if family == "virl":
        return VIRL(verify=verify)
    return GeneralPoints(verify=verify, vl=family in PICTURES, rule="id" if i % 2 else "ood")


def played(family="gp", n=8, temperature=1.0, world=world):
    """Random multi-turn episodes of a tiny model."""
    model, tok = tiny(family)
    torch.manual_seed(1)
    envs = [world(family, i, 3) for i in range(n)]
    return ev.rollout(model, tok, envs, [f"t{i}" for i in range(n)], temperature, 16, cpu())


def picture_places(model, segment):
    ids = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")]
    return [i for i, token in enumerate(segment.ids) if token in ids]


# Helpers: answers and documents of the environments.

NONE, CROSS = "nothing nearby", "at an intersection"
HOUSE, CORNER = "Oak Inn is on your left", "Oak Inn is on your left, at an intersection"


def virl_answer(action, observation=NONE):
    return json.dumps({"current observation": observation, "current instruction": "Go.", "action": action})


def turns_of(document):
    """A pretraining document -> (is it a chat?, its first text, its answers if it is a chat)."""
    if isinstance(document, str):
        return False, document, []
    equal([m["role"] for m in document], ["user", "assistant"] * (len(document) // 2), document)
    return True, document[0]["content"], [m["content"] for m in document[1::2]]


def chat_is_judged(document, judge):
    """Behind each answer but a chat's last one is what the verifier says of it, and it is wrong."""
    for answer, feedback in zip(document[1::2], document[2::2]):
        verdict = judge(answer["content"])
        equal((feedback["content"], verdict.kind == "correct"), (verdict.feedback, False), document)


def shares(counts, *rows):
    """rows: (lowest share, what is counted, of how many, highest share)."""
    for low, part, whole, high in rows:
        within(low, counts[part] / whole, high, f"share of {part}")


def expert_plays(env, episodes):
    """Both demonstrators play; each answer is right, the last one ends the episode -> number of answers."""
    count = 0
    for i, demonstrator in itertools.product(range(episodes), env.demonstrators):
        messages, _ = env.reset(i)
        while messages:
            answer, prompt = env.expert(demonstrator), messages[0]["content"]
            if isinstance(env, VIRL):
                here, own_words = env.position, json.loads(answer)["current instruction"]
                last, matters = here is env.positions[-1], here.turn is not None
                told = [here.instruction, f"Now: {here.observation}\n", ", ".join(env_virl.RULES[env.rule])]
                expected = here.instruction if demonstrator == "habit" else shorthand(here.instruction)
                equal(own_words, expected, demonstrator)
            else:
                last, matters = True, bool(set(env.cards) & set("JQK"))
                rule = "A is 1; J is {}; Q is {}; K is {}.".format(*RULES[env.rule])
                told = [", ".join(env.cards), rule]
            equal([text for text in told if text not in prompt], [], prompt)
            equal((env.expert(demonstrator), len(messages)), (answer, 1), "asked again, messages")
            step = env.step(answer)
            equal(step.info, {"verdict": "correct", "position_done": True, "position_solved": True,
                              "success": last, "rule_matters": matters, "other_rule": False,
                              "recognized": None}, answer)
            done = step.reward, step.done, step.messages is None
            equal(done, (env.reward_scale, last, last), answer)
            messages, count = step.messages, count + 1
    return count


# ------------------------------------------------------------------------------------------------------------
# verifier.py

def test_reading_formulas_and_objects():
    """At each bound (length, depth, digits, end that is read): the last legal and the first illegal case."""
    for text, value, numbers in (
            ("8/(3-8/3)", 24, [8, 3, 8, 3]), ("2-3-4", -5, [2, 3, 4]), ("8/4/2", 1, [8, 4, 2]),
            ("1/3", Fraction(1, 3), [1, 3]), ("2+3*4", 14, [2, 3, 4]), ("(" * 16 + "8" + ")" * 16, 8, [8]),
            ("9999", 9999, [9999]), ("1*" * 63 + "1 ", 1, [1] * 64),
            ("9999*" * 25 + "9", 9999 ** 25 * 9, [9999] * 25 + [9])):
        equal(evaluate_formula(text), (Fraction(value), numbers), text)
    for text in ("", "1+", "(1", "1)", "+1", "1/0", "99999", "1*" * 64 + "1", "(" * 17 + "8" + ")" * 17):
        assert raises(FormulaError, "", lambda: evaluate_formula(text)), f"{text!r}: an error without words"
    answer, fields = '{"formula": "4*6"}', {"formula": "4*6"}
    for text, expected in (
            ('{"formula": "1"} then ' + answer + " done", fields), (f"```json\n{answer}\n```", fields),
            ('{"formula": {"a": 1}}', {"formula": {"a": 1}}), ('{"a": 1', None), ("[1]", None),
            ("{" * 20_000 + answer, fields), (answer.ljust(4096), fields), (answer.ljust(4097), None)):
        equal(last_json_object(text), expected, text[:40])


def test_gp_verdicts_and_rewards():
    """Of the hand 3 3 8 8: each verdict has its reward and its feedback."""
    right, cards, misread = "8/(3-8/3)", ["3", "3", "8", "8"], ["3", "8", "8", "4"]
    rewards = {"correct": 5, "wrong_value": -1, "misread": -1.5, "wrong_numbers": -2, "illegal": -3}
    illegal = ("", "8*", "-8+8", "(8", "8)", "8 8", "2^3", "8//3", "8**3", "9**9**9", "abc", "8/(3-3)",
               "88/(3-3)", "٨+٨", "８", "1e3", "1_0", "0x8", "8.0", "(" * 40 + "8" + ")" * 40, "=24", "8=",
               "8=24=24", "24=8*3", "8=٢٤", "8=2 4", right + "=00024", "\x008", None, 7, [1], {"a": 1}, True)
    for formula, kind, target, shown in (
            *((formula, "illegal", 24, None) for formula in illegal), (right, "correct", 24, None),
            (" 8 / ( 3 - 8 / 3 ) = 24 ", "correct", 24, None), (right + "=0024", "correct", 24, None),
            (right + "=23", "wrong_value", 24, None), (right, "wrong_value", 25, None),
            ("8*3+8-3", "wrong_value", 24, None), ("8*3+8-3", "correct", 29, None),
            ("8*3+8-3=24", "wrong_value", 29, None), ("8*3", "wrong_numbers", 24, None),
            ("8+8+8+0", "wrong_numbers", 24, None), (right, "correct", 24, cards[::-1]),
            (right, "misread", 24, misread), ("x", "misread", 24, misread), ("x", "illegal", 24, cards)):
        v = judge_gp(json.dumps({"cards": cards, "formula": formula}), [3, 3, 8, 8], target, shown)
        what = formula, target, shown
        equal((v.kind, v.reward, v.feedback), (kind, rewards[kind], GP_FEEDBACK[kind]), what)
    equal((GP_REWARD, judge_gp('{"formula": "12*2"}', [2, 12]).numbers), (rewards, [12, 2]), "table, numbers")


def test_virl_verdicts_and_rewards():
    """Each verdict has its reward and feedback. The order: illegal, a wrong claim, a wrong action."""
    rewards = {"correct": 1, "wrong_action": -1, "wrong_intersection": -1.5, "illegal": -1}
    west, slight = "turn_direction(west)", "turn_direction(slightly left)"

    def check(answer, kind, right=west, crossing=False):
        v, what = judge_virl(answer, right, crossing), (answer, right, crossing)
        equal((v.kind, v.reward, v.feedback), (kind, rewards[kind], VIRL_FEEDBACK[kind]), what)
    bad = ("up", "west)", "West", "'west\"", "'west", "''west''", "slightlyleft", "slightly  left", "\twest")
    for seen in (NONE, CORNER):
        for action, right in (("forward()", "forward()"), ("stop()", "stop()"), (slight, slight),
                              ("turn_direction( 'slightly left' )", slight)):
            check(virl_answer(action, seen), "correct", right, seen == CORNER)
        for word in ("west", " west ", "'west'", '"west"', " ' west ' "):
            check(virl_answer(f"turn_direction({word})", seen), "correct", west, seen == CORNER)
        for wrong in ("", "west", None, 7, True, [], ["forward()"], {"a": 1}, " forward()", "forward( )",
                    "forward", "Forward()", "stop();", "forward()stop()", west + " ", west + "\n",
                    "turn_direction (west)", "turn_direction()", "turn_direction(west",
                    *(f"turn_direction({word})" for word in bad)):
            check(virl_answer(wrong, seen), "illegal")
    for action in ("turn_direction(east)", "turn_direction(left)", "turn_direction(northwest)", "forward()",
                   "stop()"):
        check(virl_answer(action), "wrong_action")
    for seen, crossing in (
            (CORNER, False), ("You see an INTERSECTION", False), (NONE, True), (None, True), (7, True),
            (["intersection"], True), ({}, True), ("no intersection here", True),
            ("Not at any intersection.", True), ("a shop, and no sign, at an intersection", False),
            ("an intersection but no shop", False), ("at an intersection with no visible landmark", False),
            ("no landmarks at this intersection", False), ("no landmark and no intersection", True)):
        for action in (west, "stop()"):
            check(virl_answer(action, seen), "wrong_intersection", crossing=crossing)
    check(virl_answer(west, "This isn't an intersection"), "correct")
    for text in ("", "forward()", "[1]", '{"current observation": "x"}', '{"action": "forward()"',
                 '{"Action": "forward()"}'):
        check(text, "illegal")
    plain = judge_virl(virl_answer("turn_direction( 'west' )"), "stop()", False).action
    equal((VIRL_REWARD, plain), (rewards, west), "the table, an action")


def test_feedback_gives_nothing_away():
    """Feedback holds no number and no action."""
    for table, rewards in ((GP_FEEDBACK, GP_REWARD), (VIRL_FEEDBACK, VIRL_REWARD)):
        equal(list(table), list(rewards), "kinds")
        for kind, text in table.items():
            away = re.findall("|".join(("[0-9]", "forward", "stop", *COMPASS, *RELATIVE)), text)
            equal((away, text.endswith("Try again.")), ([], kind != "correct"), text)


NASTY = ["", "null", "7", "[1]", "NaN", "nonsense", "forward()", "\x00", "\ud800", '{"a": 1', "[" * 10_000,
         "{" * 10_000, '{"a":' * 10_000, "{" + "}" * 10_000, '{"action": "forward()" ' * 500,
         '{"action": "turn_direction(' + " " * 4000 + '"}',
         '{"action": "turn_direction(' + "'" * 4000 + ')"}']
for field in ("cards", "formula", "action", "current observation"):
    for value in ("null", "NaN", "1e999", "7", "true", "[]", "[[[]]]", "{}", '"\\ud800"', '"\ud800"',
                  "9" * 4000, "9" * 10_000, f'"{"9" * 10_000}"', f'"{"(" * 10_000}"', "[" * 900 + "]" * 900,
                  "[" * 2030 + "]" * 2030, '[null, {}, true, 1e999, "\\ud800"]'):
        NASTY.append('{"%s": %s}' % (field, value))


def test_judges_survive_anything():
    """The nasty list, right answers with some characters changed, and random texts."""
    hand, rng, cards = [3, 11, 10, 13], random.Random(0), ["3", "J", "10", "K"]
    alphabet = '0123456789+-*/()=" {}[],:.\'abcnuisJQK\\\n٣８½²\x00\ud800'

    def check(text):
        plain, seen = judge_gp(text, hand), judge_gp(text, hand, cards=cards)
        walk = judge_virl(text, "turn_direction(slightly left)", True)
        equal([v.reward for v in (plain, seen, walk)],
              [GP_REWARD.get(plain.kind), GP_REWARD.get(seen.kind), VIRL_REWARD.get(walk.kind)], text)
        share = env_gp.recognized(text, cards)  # all recognized is what the verifier calls not misread
        equal(share == 1, last_json_object(text) is not None and seen.kind != "misread", text)
        for share in (share, *(env_virl.recognized(text, truth) for truth in (NONE, HOUSE, CORNER))):
            within(0, share, 1, text)
    for text in NASTY:
        check(text)
        equal(env_gp.recognized(text, cards), 0, text[:60])
    gp = '{"cards": ["3", "J", "10", "K"], "number": [3, 11, 10, 13], "formula": "(10-3)/13+11"}'
    turn, on = virl_answer("turn_direction(slightly left)", CROSS), virl_answer("forward()", CORNER)
    for good in 3000 * [gp, turn, on]:
        chars = list(good)
        for _ in range(rng.randrange(1, 6)):
            chars[rng.randrange(len(chars))] = rng.choice(alphabet)
        check("".join(chars))
        check("".join(rng.choices(alphabet, k=rng.randrange(80))))


def test_words_of_turns():
    """All pairs of whole headings, against counting the degrees to the right; and what lies between."""
    for old, new in itertools.product(range(-10, 371), repeat=2):
        right = (new - old) % 360
        word = "slightly " * (min(right, 360 - right) <= 45) + ("right" if right < 180 else "left")
        equal(relative_word(old, new), word, (old, new))
    equal([relative_word(0, new) for new in (45.1, 314.9)], ["right", "left"], "45.1 degrees")
    for k, off, turn in itertools.product(range(8), (*range(-22, 23), -22.5, 22.4), (-720, -360, 0, 360)):
        equal(compass_word(45 * k + off + turn), COMPASS[k], (k, off, turn))
    equal([compass_word(heading) for heading in (-1e-20, 359.99)], ["north"] * 2, "by a hair")


# ------------------------------------------------------------------------------------------------------------
# What holds for both environments.

def test_same_seed_same_episodes_in_another_process():
    """Hands, routes, pictures, documents, where strings have other hashes; only the episode's seed counts."""
    code = """if True:
        import hashlib, random
        from env_gp import GeneralPoints
        from env_virl import VIRL
        for Env in (GeneralPoints, VIRL):
            for vl, look, split in ((0, "id", "train"), (0, "id", "unseen"), (1, "id", "train"),
                                    (1, "ood", "unseen")):
                env, seen = Env(seed=5, vl=vl, visual=look, split=split), []
                for seed in (None, None, "a", 7):
                    messages, images = env.reset(seed)
                    while messages:
                        seen.append((messages, [i.tobytes() for i in images], env.expert()))
                        step = env.step(env.expert())
                        messages, images = step.messages, step.images
                print(Env.title, vl, look, split, hashlib.sha256(ascii(seen).encode()).hexdigest())
            rng, texts = random.Random(1), []
            for _ in range(20):
                document, [picture] = Env.picture_document(rng)
                texts += [Env.document(rng), document, picture.tobytes()]
            print(Env.title, "documents", hashlib.sha256(ascii(texts).encode()).hexdigest())"""
    here = printed(exec, code, {})
    equal(command("-c", code, PYTHONHASHSEED=str(os.getpid())), here, "the output of another process")
    equal(len({line.split()[-1] for line in here.splitlines()}), 10, here)
    for Env in (GeneralPoints, VIRL):
        prompts = {Env(seed=seed).reset()[0][0]["content"] for seed in range(20)}
        within(16, len(prompts), 20, "episodes of 20 seeds")
        a, b, made = (Env(seed=seed, vl=True) for seed in (3, 4, "x"))
        x, *others = (env.reset(seed)[1][0].tobytes() for env, seed in (
            (a, "x"), (a, "x"), (b, "x"), (made, None), (a, None), (b, "y")))
        equal([other == x for other in others], [True] * 3 + [False] * 2, Env.title)


def test_columns_and_bad_keywords():
    """columns() has each column's keywords. Each bad keyword of an environment is named in an error."""
    other = {"id": "ood", "ood": "id"}
    for Env, held_out, more, bad in ((GeneralPoints, "faces", {}, {"pixels": 39}),
                                     (VIRL, "unseen", {"move_on": True}, {"pixels": 15, "split": "faces"})):
        equal((set(Env.rule_names), set(Env.visual_names)), (set(RULES), set(RULES)), Env.title)
        for rule, visual in itertools.product(RULES, (None, *RULES)):
            cell = {"rule": rule, "split": "unseen", **more}
            expected = {"seen": {**cell, "split": "train"}, "id": cell,
                        "ood": {**cell, "rule": other[rule], "split": held_out}}
            if visual:
                expected["visual"] = {**cell, "visual": other[visual]}
                expected["visual"].update({"split": "all"} if Env is VIRL else {})
            equal(list(Env.columns(rule, visual).items()), list(expected.items()), (Env.title, rule, visual))
        for name, value in [("rule", "x"), ("split", "x"), ("verify", 0), ("visual", "x"), ("pixels", 0),
                            *bad.items()]:
            refused(f"{name}={value!r}", lambda: Env(vl=True, **{name: value}))
    refused("--data", lambda: GeneralPoints(data="x"))


def test_expert_is_always_right():
    """Under every rule and split, with one attempt too: see expert_plays()."""
    for rule, split in itertools.product(RULES, ("train", "unseen", "faces")):
        equal(expert_plays(GeneralPoints(rule=rule, split=split), 50), 100, (rule, split))
    for rule, split, move_on in itertools.product(RULES, ("train", "unseen"), (False, True)):
        env = VIRL(rule=rule, split=split, move_on=move_on, verify=1)
        within(301, expert_plays(env, 20), 999, (rule, split))


def test_pictures_show_what_words_tell():
    """Pictures change no episode: what is shown leaves the prompt, and a conversation keeps its picture."""
    def blunder(env):  # for V-IRL misread, too
        if isinstance(env, GeneralPoints):
            return json.dumps({"cards": env.cards, "formula": "1"})
        return virl_answer("forward()" if env.position.action == "stop()" else "stop()", "a tower")

    def check_position(text, vl, words, messages, images):
        """One blunder and one right answer in words and with a picture -> the two steps after them."""
        gp, before = isinstance(vl, GeneralPoints), images[0].tobytes()
        place, told = ((env_gp.IN_PICTURE, ", ".join(vl.cards)) if gp else
                       (env_virl.IN_PICTURE, vl.position.observation))
        prompt, said = messages[0]["content"], blunder(vl)
        equal((prompt.count(place), "picture" in words[0]["content"]), (1, False), prompt)
        equal(prompt.replace(place, told), words[0]["content"], "the prompt in words")
        equal([(image.mode, image.size) for image in images], [("RGB", (40, 40))], "pictures")
        asked = gp or vl.at > 0 and vl.positions[vl.at - 1].action == "forward()"  # else the prompt tells
        for env, chat, shown in ((text, words, []), (vl, messages, images)):
            step = env.step(said)
            feedback = (GP_FEEDBACK if gp else VIRL_FEEDBACK)[step.info["verdict"]]
            after = chat + [{"role": "assistant", "content": said}, {"role": "user", "content": feedback}]
            equal((step.done, step.images, step.messages), (False, shown, after), "the conversation goes on")
        equal((step.images is images, images[0].tobytes() == before), (True, True), "the picture is kept")
        wrong = (None,) if not asked else (1,) if gp else (0, 1 / 3, 0.5)
        assert step.info["recognized"] in wrong, step.info
        seen, plain = vl.step(vl.expert()), text.step(text.expert())
        equal((seen.info, seen.reward), ({**plain.info, "recognized": 1 if asked else None}, plain.reward))
        equal((plain.info["recognized"], plain.images, seen.images is images), (None, [], False), prompt)
        return plain, seen
    for Env, rule, visual in itertools.product((GeneralPoints, VIRL), RULES, RULES):
        text, vl = (Env(rule=rule, visual=visual, vl=see, seed=3, pixels=40) for see in (False, True))
        for seed in (None, None, *range(4)):
            (words, none), (messages, images), pictures = text.reset(seed), vl.reset(seed), []
            equal(none, [], "pictures of a task in words")
            while messages:
                pictures.append(images[0].tobytes())
                plain, step = check_position(text, vl, words, messages, images)
                messages, images, words = step.messages, step.images, plain.messages
            equal((images, step.done, len(set(pictures))), ([], True, len(pictures)), "the end, pictures")


def test_recognized():
    """The share of a picture's parts that an answer names: the cards; landmark, side and intersection."""
    hand = ["3", "J", "10", "K"]
    for said, cards, share in (
            (hand, hand, 1), (hand[::-1], hand, 1), ([10, 3, "K", "J"], hand, 1), ([], hand, 0),
            (["3", "J", "10", "Q"], hand, 0.75), (["3"] * 4, hand, 0.25), (["J", "3"], hand, 0.5),
            (["3"] * 4, ["3", "3", "A", "A"], 0.5), (hand + ["K"], hand, 0.8), (env_gp.RANKS, hand, 4 / 13),
            (env_gp.RANKS * 4, hand, 4 / 52), ([hand], hand, 0), ([3] * 1301, hand, 1 / 1301),
            ("3, J, 10, K", hand, 0), ({"3": "J"}, hand, 0), (None, hand, 0)):
        equal(env_gp.recognized('{"cards": ["A"]} and ' + json.dumps({"cards": said}), cards), share, said)
    tokyo, a_is_b, bare = "東京 is on your right", 'The "A is B" Inn is on your left', f"{NONE}, {CROSS}"
    nothing = itertools.product((None, 7, True, [], [NONE], {}, {"a": NONE}, 1e999), (NONE, CORNER))
    for share, pairs in (
            (1, ((CORNER, CORNER), (HOUSE, HOUSE), (NONE, NONE), (CROSS, CROSS), (a_is_b, a_is_b),
                 (tokyo, tokyo), ("  OAK inn\nis on  your left, AT an Intersection ", CORNER),
                 ("Nothing  Nearby", NONE), (bare, CROSS))),
            (2 / 3, ((HOUSE, CORNER), (CORNER, HOUSE), (CORNER.replace("left", "right"), CORNER),
                     ("Oak Inn", HOUSE), (CORNER.replace("Inn", "Cafe"), CORNER),
                     (f"Oak Inn, {CROSS}", CORNER))),
            (1 / 2, ((CROSS, NONE), (NONE, CROSS), (HOUSE, NONE), (CORNER, CROSS))),
            (1 / 3, ((CROSS, CORNER), (NONE, HOUSE), ("\ud800", HOUSE),
                     ("Sun Cafe is on your left", CORNER))),
            (0, (("Sun Cafe is on your right", CORNER), (NONE, CORNER), (CORNER, NONE), (HOUSE, CROSS),
                 ("", NONE), (" ", NONE), ("x" * 5000, HOUSE), *nothing))):
        for said, truth in pairs:
            near(env_virl.recognized(virl_answer("forward()", said), truth), share, 1e-9, (said, truth))


def test_texts_are_few_tokens():
    """The tiny tokenizers lose nothing. Fixed phrases are one or two tokens, V-IRL's varying words one."""
    for family, env in (("gp", GeneralPoints()), ("virl", VIRL())):
        tok = tiny(family)[1]
        for text in ('{"formula": "(11-5)*4"}', "naïve – 中文 \x00 🂡", env.reset(0)[0][0]["content"]):
            equal(tok.decode(ids_of(tok, text)), text)
    tok, parts = sft.build_tiny("gp", 0, vl=True)[1], (["A", "2", "3", "4"], (1, 2, 3), [1, 2, 3, 4], "2*3*4")
    caption, game = (tok.tokenize(env_gp.fill(words, *parts)) for words in (env_gp.CAPTION, env_gp.GAME))
    equal([t in game for t in caption if "Cards" in t], [True], "the card list begins with the same token")
    within(1, len(caption), 11, caption)
    for vl, its in ((True, tok), (False, tiny()[1])):
        within(1, len(ev.prompt(its, GeneralPoints(vl=vl).reset(0)[0]).ids), 39, "tokens of a prompt")
    equal(len(tok.tokenize(env_gp.IN_PICTURE)), 1, "tokens of the picture's place")
    tok, lengths, costs = tiny("virl")[1], [], Counter()
    landmarks = [f"{name} is on your {side}" for name in env_virl.LANDMARKS for side in ("left", "right")]
    for word in (*landmarks, *itertools.chain(*env_virl.SPACES.values())):
        equal(len(tok.tokenize(word)), 1, word)
    for rule, i, demonstrator in itertools.product(RULES, range(20), VIRL.demonstrators):
        env = VIRL(rule=rule, split="unseen")
        states = sft.demonstrations(env, i, demonstrator)
        for (messages, _, answer), position in zip(states, env.positions, strict=True):
            ids, turn = ev.prompt(tok, messages).ids, position.turn
            words = {relative_word(*turn), compass_word(turn[1])} if turn else set()
            equal(words - {tok.decode([t]) for t in ids}, set(), messages)
            lengths.append(len(ids))
            costs[demonstrator] += len(tok.tokenize(answer))
    within(45, sum(lengths) / len(lengths), 70, "mean length of a prompt")
    within(1, max(lengths), 109, "the longest prompt")
    within(1, costs["expert"], costs["habit"], "tokens of the expert in its own words")


# ------------------------------------------------------------------------------------------------------------
# env_gp.py

def test_solver():
    """Python's parser over Fractions agrees on all solutions and random formulas; no hand is missed."""
    table, rng = {hand: solutions(hand) for hand in all_hands()}, random.Random(0)
    counts = len(table), sum(map(bool, table.values())), sum(map(len, table.values()))
    equal(counts, (1820, 1362, 4469), "hands, solvable hands, solutions")
    ten = all_hands(10, solvable=True)
    equal((ten, len(ten)), ([hand for hand in all_hands(10) if table[hand]], 566), "solvable with 1 to 10")
    equal(table[4, 4, 6, 12], ("12*4-4*6", "(12+4)*6/4", "(12-4-4)*6", "(12/6+4)*4", "(4*4-12)*6",
                               "(4+4-6)*12", "12*4/(6-4)"), "each in one canonical form")
    for hand, found in table.items():
        equal(list(found), sorted(set(found), key=lambda s: (len(s), s)), "each once, shortest first")
        for formula in (*found, env_gp.some_formula(hand, rng, noise=1)):
            value = None
            with contextlib.suppress(ZeroDivisionError):
                value = eval(re.sub(r"([0-9]+)", r"Fraction(\1)", formula))  # legal: Python's grammar agrees
            kind = "illegal" if value is None else "correct" if value == 24 else "wrong_value"
            equal(judge_gp(json.dumps({"formula": formula}), list(hand)).kind, kind, formula)
            assert kind == "correct" or formula not in found, f"{formula} makes {value}"


def test_gp_deals_and_demonstrators():
    """Both rules train on as many hands, none unseen. The expert has any solution, habit the shortest."""
    dealt = {"train": set(), "unseen": set(), "faces": set()}
    for rule, split in itertools.product(RULES, dealt):
        hands, first, differ = env_gp.training_hands(rule), {}, 0
        equal((len(hands), max(map(max, hands))), (env_gp.TRAIN_HANDS, max(RULES[rule])), rule)
        equal([hand for hand in hands if env_gp.is_unseen(hand) or not solutions(hand)], [], rule)
        env, other = (GeneralPoints(rule=rule, split=split, seed=seed) for seed in (7, 8))
        count_as = {**{str(n): n for n in range(2, 11)}, "A": 1, **dict(zip("JQK", RULES[rule]))}
        for i in range(400):
            env.reset(i)
            other.reset(i)
            key = tuple(sorted(env.numbers))
            equal(env.numbers, [count_as[rank] for rank in env.cards], env.cards)
            splits = key in hands, env_gp.is_unseen(key)
            equal(splits, (split == "train", split != "train"), (rule, split, key))
            assert split != "faces" or set(env.cards) & set("JQK"), f"expected a face, got {env.cards}"
            dealt[split].add(key)
            for demonstrator, allowed in (("expert", solutions(key)), ("habit", solutions(key)[:1])):
                said = json.loads(env.expert(demonstrator))
                assert said["formula"] in allowed, f"{demonstrator}: expected one of {allowed}, got {said}"
                again = first.setdefault((demonstrator, key), said["formula"])  # of a hand that comes again
                expected = [("cards", env.cards), ("number", env.numbers), ("formula", again)]
                equal(list(said.items()), expected, demonstrator)
            equal(env.expert(), env.expert("expert"), "the default")
            equal(other.expert("habit"), env.expert("habit"), "habit, for another seed")
            differ += env.expert() != other.expert()
        within(40, differ, 360, "deals that two seeds solve in different ways")
    equal(dealt["train"] & (dealt["unseen"] | dealt["faces"]), set(), "hands of both splits")
    within(300, len(dealt["train"]), 600, "hands dealt in training")
    within(81, len(dealt["unseen"] | dealt["faces"]), 1820, "unseen hands dealt")
    within(0.17, sum(map(env_gp.is_unseen, all_hands())) / 1820, 0.23, "share of unseen hands")


def test_gp_steps():
    """Misread comes first; the last attempt ends it; an answer that follows the other rule is noticed."""
    keywords = dict(rule="ood", split="faces")
    seeing, plain = GeneralPoints(**keywords, vl=True, verify=1), GeneralPoints(**keywords, verify=3)
    for seed in range(20):
        seeing.reset(seed)
        plain.reset(seed)
        cards, right = seeing.cards, json.loads(seeing.expert())["formula"]
        wrong = cards[:3] + [next(r for r in env_gp.RANKS if r != cards[3])]
        unlike, other = ("+".join(map(str, env_gp.numbers_of(cards, RULES[rule]))) + "=23"
                         for rule in ("ood", "id"))
        said = lambda cards, formula: json.dumps({"cards": cards, "formula": formula})
        for answer, kind, share in (
                (said(wrong, right), "misread", 0.75), (said(wrong, "1/0"), "misread", 0.75),
                (said(None, right), "misread", 0), (said(cards + ["A"], right), "misread", 0.8),
                (said(cards[::-1], right), "correct", 1), (said(cards, "1/0"), "illegal", 1),
                (said(cards, "4*6+99"), "wrong_numbers", 1), (said(cards, unlike), "wrong_value", 1),
                ("{}", "misread", 0), ("no", "illegal", 0), ('{"cards": []', "illegal", 0)):
            seeing.reset(seed)
            step = seeing.step(answer)
            actual = step.info["verdict"], step.info["recognized"], step.reward, step.done
            equal(actual, (kind, share, GP_REWARD[kind], True), answer)
            equal((step.messages, step.images), (None, []), answer)
        for attempt, (formula, follows) in enumerate(((unlike, False), (other, True), ("", False))):
            step = plain.step(json.dumps({"formula": formula}))
            actual = step.info["other_rule"], step.info["rule_matters"], step.done, step.info["success"]
            equal(actual, (follows, True, attempt == 2, False), (cards, formula))
            if not step.done:
                equal(step.messages[-1]["content"], GP_FEEDBACK[step.info["verdict"]], "feedback")


def test_gp_example():
    """The prompt's example is a legal answer to cards that are never dealt: a copy is wrong."""
    shown = last_json_object(GeneralPoints().reset(0)[0][0]["content"])
    equal(env_gp.numbers_of(shown["cards"], RULES["id"]), shown["number"], "the example's numbers")
    equal(solutions(tuple(shown["number"])), (), "the example's solutions")
    for rule, vl in itertools.product(RULES, (False, True)):
        env = GeneralPoints(rule=rule, vl=vl)
        env.reset(1)
        equal(env.step(env_gp.EXAMPLE).info["verdict"], "misread" if vl else "wrong_numbers", "a copy")


def test_gp_documents():
    """A tenth of formulas is wrong. The rare look is rare and its text noisy; common captions are true. Games
    have many rules, in half of them J = Q = K; a chat ends with the right answer."""
    rng, count, rules = random.Random(0), Counter(), []
    with mock.patch.object(env_gp, "picture", return_value="picture") as draw:
        documents = [("words", env_gp.document(rng), [], [], None) for _ in range(2000)]
        documents += [("exact", env_gp.document(rng, 0, noise=0), [], [], None) for _ in range(500)]
        for _ in range(3000):
            document, images = GeneralPoints.picture_document(rng, noise=0.1)
            documents.append(("seen", document, images, *draw.call_args.args[:2]))
        others = []
        for _ in range(500):
            GeneralPoints.picture_document(rng, rare="id", pixels=60)
            others.append(draw.call_args.args)
    equal(len({call.args[3] for call in draw.call_args_list}), 3500, "seeds of pictures")
    equal({args[2] for args in others}, {60}, "pixels")
    within(0.8, sum(args[1] == "ood" for args in others) / 500, 0.97, "share of the look that is not rare")
    for task, document, images, cards, look in documents:
        chat, text, answers = turns_of(document)
        faces = dict(re.findall("([AJQK]) is ([0-9]+)", text))
        parts = [json.loads(answer) for answer in answers]
        count.update([look, f"{task} chat" if chat else task])
        rules += [tuple(faces[face] for face in "JQK")] if faces else []
        if chat:
            shown = cards or re.search("\nCards: ([^.\n]+)", text)[1].split(", ")
            numbers = [int(faces.get(rank, rank)) for rank in shown]
            chat_is_judged(document, lambda said: judge_gp(said, numbers, cards=cards and shown or None))
        equal(images, ["picture"] * bool(cards), text)
        equal(str(document).count("<image>"), bool(cards and not chat), text)
        if not chat and "formula: " in text:
            numbers = json.loads(re.search(r"Numbers: (\[.*?\])", text)[1])
            formula = text.split("formula: ")[1]
            parts = [{"cards": numbers, "number": numbers, "formula": formula}]
            kind = judge_gp(json.dumps(parts[0]), numbers).kind
            count.update({f"{task} game": 1, f"{task} wrong": kind != "correct"})
            assert kind in ("correct", "wrong_value") or kind == "illegal" and "/" in formula, text  # 1/0
            if task == "exact":  # without noise the base writes what expert("habit") does
                equal(formula, solutions(tuple(sorted(numbers)))[0], text)
        if not chat and "Cards: " in text:
            said = re.search("\nCards: ([^.\n]+)", text)[1].split(", ")
            assert len(said) == 4 and set(said) <= set(env_gp.RANKS), text
            count[f"{look} misread"] += said != cards
            count.update({"caption": not parts and bool(cards), "alike": not parts and len(set(cards)) == 1})
            parts = [{**part, "cards": said} for part in parts]
        for part in parts:  # consistent, right or wrong
            equal(part["number"], [int(faces.get(str(c), c)) for c in part["cards"]], document)
            count[f"{look} chat misread"] += chat and bool(cards) and sorted(part["cards"]) != sorted(cards)
    shares(count, (0.05, "words chat", 2000, 0.11), (0.07, "words wrong", 2000, 0.13),
           (0.08, "ood", 3000, 0.12), (0.4, "ood misread", count["ood"], 0.55), (0, "id misread", 1, 0),
           (0.42, "caption", 3000, 0.50), (0.45, "alike", count["caption"], 0.55),
           (0.06, "seen chat", 3000, 0.10), (0.42, "seen game", 3000, 0.50),
           (0.07, "seen wrong", count["seen game"], 0.13),
           (0.003, "id chat misread", 3000, 0.03), (0.005, "ood chat misread", 3000, 0.03))
    within(0.4, sum(len({*rule}) == 1 for rule in rules) / len(rules), 0.6, "share of rules with J = Q = K")
    within(500, len({*rules}), 13 ** 3, "rules")
    for share, kind in ((1.0, list), (0.0, str)):
        equal({type(env_gp.picture_document(rng, share)[0]) for _ in range(20)}, {kind}, share)
    (small, picture), (large, _) = (env_gp.picture_document(random.Random(2), pixels=n) for n in (96, 80))
    equal((small, picture[0].size), (large, (96, 96)), "the text does not depend on the size")


def test_gp_red_and_black_differ_in_colour_only():
    """Inks share green and blue: there the looks are equal in a card's upper 20 rows, which have no suit."""
    for rank in env_gp.RANKS:
        cards = [np.asarray(env_gp.draw_card(rank, suit, 80))[:20, :, 1:].tolist() for suit in "SCHD"]
        assert cards == cards[:1] * 4, f"{rank}: expected one green and blue, got several"
    for pixels, seed in itertools.product((80, 300), range(6)):
        cards = random.Random(seed).choices(env_gp.RANKS, k=4)
        black, red = (np.asarray(env_gp.picture(cards, look, pixels, seed), int) for look in ("id", "ood"))
        for top in (0, pixels // 2):  # where a card that lies as high as it can has its rank
            more = (red - black)[top:top + pixels // 4]
            equal((np.abs(more[..., 1:]).max(), more.min(), more.max() > 0), (0, 0, True), (pixels, seed))
        within(0.02, (black != red).any(2).mean(), 0.25, (pixels, seed))
    for look, suits in env_gp.SUITS.items():  # the suit is drawn, and from a seed of its own, as grain is
        equal(len({env_gp.draw_card("7", suit, 80).tobytes() for suit in suits}), 2, look)
        pictures = [env_gp.picture(["7"] * 4, look, 80, seed) for seed in range(20)]
        for width, what in ((4, "grain"), (80, "pictures")):
            equal(len({p.crop((0, 0, width, 80)).tobytes() for p in pictures}), 20, what)


def test_gp_pictures_show_the_cards_in_reading_order():
    """A template matcher reads all ranks at 80 pixels, also by the other look's. All sizes show the same."""
    inks = [{rank: np.asarray(env_gp.draw_card(rank, suit, 80), float)[:21, :, 1] for rank in env_gp.RANKS}
            for suit in "SD"]
    for seed, look in itertools.product(range(13), env_gp.SUITS):
        cards = [env_gp.RANKS[(seed + 3 * i) % 13] for i in range(4)]
        green = np.asarray(env_gp.picture(cards, look, 80, seed), float)[..., 1]
        for (i, rank), ink in itertools.product(enumerate(cards), inks):
            quarter = green[40 * (i // 2):][:40, 40 * (i % 2):][:, :40]
            windows = [quarter[y:y + 21, x:x + 28].ravel() for y in range(5) for x in range(4, 9)]
            best = {r: max(np.corrcoef(window, template.ravel())[0, 1] for window in windows)
                    for r, template in ink.items()}
            equal(max(best, key=best.get), rank, (look, cards))
            within(0.9, best[rank], 1.0, (look, cards))
    small, other = (np.asarray(env_gp.picture(cards, "ood", 80, seed), int) for seed in (0, 1))
    within(25, np.abs(other - small).mean(), 255, "two seeds show two scenes")
    for pixels in (40, 81, 336, 1200):
        image = env_gp.picture(cards, "ood", pixels, 0)
        equal((image.size, image.mode), ((pixels, pixels), "RGB"), pixels)
        far = np.abs(np.asarray(image.resize((80, 80)), int) - small).mean()
        within(0, far, 15 if pixels > 40 else 25, pixels)


# ------------------------------------------------------------------------------------------------------------
# env_virl.py: the city.

def test_virl_rail():
    """Only the right action moves. After `verify` attempts training ends, and evaluation goes on."""
    for rule, verify, move_on, episode in itertools.product(RULES, (1, 2, 3), (False, True), range(12)):
        env = VIRL(rule=rule, verify=verify, move_on=move_on)
        env.reset(episode)
        failed, path = episode % len(env.positions), []
        for k, position in enumerate(env.positions):
            path.append(env.position)
            action = "forward()" if position.action == "stop()" else "stop()"
            for attempt in range(verify - (k != failed)):  # elsewhere the expert has the last one
                step, last = env.step(virl_answer(action, position.observation)), attempt == verify - 1
                equal([*step.info.values()][:4], ["wrong_action", False, last, False], position)
                assert last or env.position is position and len(step.messages) == 2 * attempt + 3, position
            step = env.step(env.expert()) if k != failed else step
            if step.done:
                break
            shown = step.messages[0]["content"].split("Last steps: ")[1]
            assert "stop()" not in shown, "only right actions are shown"
            equal(shown.split("\nNow: ")[0].count(": "), min(env.at, 3), "the last steps, up to three")
        equal(path, env.positions if move_on else env.positions[:failed + 1], "the path")
        equal((step.done, step.messages, step.info["success"]), (True, None, False), "the end")


def test_virl_prompt_states_the_rule():
    """Prompts are the same under both rules but for the words of turns; the other rule's word is noticed."""
    goal, bar = "Move forward until you reach ", "A bar where Turn is on your left"
    for line, own in (("First, turn left to face west.", "left, that is west"),
                      ("Turn slightly right to face north.", "slightly right, that is north"),
                      (goal + "next intersection.", "on to the intersection"),
                      (f"{goal}next intersection where {bar}.", f"on to the intersection, {bar}"),
                      (f"{goal}destination where {bar}.", f"on to the destination, {bar}")):
        equal(shorthand(line), own, line)  # the expert's own words keep both of a turn and the whole landmark
    heads = [f"x one of {', '.join(words)}.\nRoute:" for words in (COMPASS, RELATIVE)]
    for seed in range(30):
        envs = [VIRL(rule=rule, move_on=True) for rule in RULES]
        texts = [env.reset(seed)[0][0]["content"] for env in envs]
        equal((heads[0] in texts[0], texts[0].replace(*heads)), (True, texts[1]), "prompts")
        for p in envs[0].positions:
            answers, turns = [env.expert() for env in envs], p.turn is not None
            words = [compass_word(p.turn[1]), relative_word(*p.turn)] if turns else []
            actions = [f"turn_direction({word})" for word in words] or [p.action] * 2
            equal([json.loads(answer)["action"] for answer in answers], actions, p)
            equal(shorthand(p.instruction).split(", that is ") == words[::-1], turns, p)
            neither = f"turn_direction({'left' if 'right' in words else 'right'})"
            rounds = [(answers[::-1], True)] + [([virl_answer(neither, p.observation)] * 2, False)] * turns
            for others, follows in rounds:
                infos = [env.step(answer).info for env, answer in zip(envs, others)]
                expected = turns and follows, turns, "wrong_action" if turns else "correct"
                for info in infos:
                    equal((info["other_rule"], info["rule_matters"], info["verdict"]), expected, (p, others))


def test_virl_splits_and_words():
    """Splits share no streets and names; SFT's routes are fixed; words are frequent; 85% need no look."""
    for look, towns in env_virl.CITIES.items():
        fixed, shared = env_virl.training_routes(towns["train"]), {"train": set(), "unseen": set()}
        for split in shared:
            envs = [VIRL(split=split, visual=look, seed=i, rule=rule) for i in range(3) for rule in RULES]
            count, routes, legs = Counter(), set(), set()
            for i, env in enumerate(envs * 85):  # 510 episodes
                env.reset((i, f"x/{i}", None)[i % 3])
                places, points = env.route.places, [place.point for place in env.route.places]
                assert split != "train" or env.route in fixed, f"expected a training route, got {env.route}"
                routes.add(env.route.name)
                legs.add(len(points) - 1)
                for place, ahead in zip(places, places[1:]):
                    way, towards = complex(*ahead.point) - complex(*place.point), math.radians(place.heading)
                    near([abs(way) * math.sin(towards), abs(way) * math.cos(towards)], [way.real, way.imag],
                         1e-9, f"{place} to {ahead}: 0 is north, 90 is east")
                    where, _, landmarks = env_virl.city(env.route.name.split()[0])
                    side = relative_word(place.heading, landmarks[where.index(ahead.point)][1]).split()[-1]
                    assert ahead.landmark.endswith(f" is on your {side}"), (place, ahead)
                names = [place.landmark.split(" is")[0] for place in places[1:]]
                shared[split].update(zip(points, points[1:]), names)
                equal(len(set(points)), len(points), points)
                for p in env.positions:
                    equal(CROSS in p.observation, p.point in points[1:-1], p)  # where instructions change
                    count.update([compass_word(p.turn[1]), relative_word(*p.turn)] if p.turn else [])
                path = "".join(p.action[0] if p.action else "t" for p in env.positions)  # turn, forward, stop
                assert re.fullmatch("(tff?)+s", path), path  # only after a first step one must look
                count.update({"position": len(path), "turn": path.count("t"), "asked": path.count("tf"),
                              "no": path.count("tff")})
            equal(legs, {2, 3, 4, 5}, "legs")
            equal({name.split()[0] for name in routes}, set(towns[split]), "towns")
            equal(len(routes) == len(fixed) == env_virl.TRAIN_ROUTES, split == "train", len(routes))
            shares(count, (0.33, "turn", count["position"], 1), (0.1, "no", count["position"], 0.2),
                   (0.25, "asked", count["position"], 0.4))
            shares(count, *((0.05, word, count["turn"], 0.25) for word in COMPASS))
            shares(count, *((0.09, word, count["turn"], 0.45) for word in RELATIVE))
        equal(shared["train"] & shared["unseen"], set(), "streets and names in both")
        a, b = (VIRL(split=split, visual=look).reset(0) for split in ("unseen", "all"))
        equal(a, b, f"{look}: without data all routes are unseen ones")


def test_virl_documents():
    """A tenth of the words of turns is wrong, and of the rare look half of what is said; all else is true. A
    chat ends with the right answer."""
    rng, counts, names = random.Random(0), Counter(), set()
    with mock.patch.object(env_virl, "draw_picture", wraps=env_virl.draw_picture) as draw:
        documents = [("words", env_virl.document(rng), [], None, None) for _ in range(9000)]
        for _ in range(1500):
            document, images = env_virl.picture_document(rng, pixels=16)
            documents.append(("seen", document, images, *draw.call_args.args[0:3:2]))
    for task, doc, images, look, truth in documents:
        chat, text, answers = turns_of(doc)
        caption = text.startswith("<image>\nNow: ")
        counts.update({f"{task} chat": chat, f"{task} caption": caption,
                       f"{task} feedback": len(answers) == 2})
        answers = answers or re.findall("^{.*}$", text, re.M)
        equal([(image.mode, image.size) for image in images], [("RGB", (16, 16))] * bool(look), "pictures")
        if look:
            said = {json.loads(answer)["current observation"] for answer in answers} or {text[13:]}
            equal((text.count("<image>"), len(said), text.count("Now: ")), (1 - chat, 1, 1), text)
            assert said == {truth} or look == "ood" and (CROSS in min(said)) == (CROSS in truth), text
            counts.update({"rare": look == "ood", "misread": said != {truth}})
            names.update([env_virl.observation_parts(truth)[0]] * caption)
            assert caption or f"Now: {env_virl.IN_PICTURE}\n" in text, text
        if caption:
            continue
        equal(chat or len(answers), chat or text.count("Now: "), text)
        words = re.search(r"x one of (.*)\.\n", text)[1].split(", ")
        space = next(s for s in env_virl.SPACES if list(env_virl.SPACES[s]) == words)
        counts[f"{task} {space}"] += 1
        lines = re.split("\n(?:Last steps|Now): ", text.split("Route:\n")[1])[0].split("\n")
        turns = [shorthand(line).split(", that is ") for line in lines if "urn " in line]
        if chat:
            assert space in RULES and text.startswith("You walk along a route") and len(answers) < 3, text
            line = json.loads(answers[0])["current instruction"]
            word = next((word for word in shorthand(line).split(", that is ") if word in words), None)
            right = (f"turn_direction({word})" if word else json.loads(answers[0])["action"])
            crossing = CROSS in (truth or re.search("\nNow: (.*)\n", text)[1])
            chat_is_judged(doc, lambda said: judge_virl(said, right, crossing))
        if text.startswith("A walk."):
            right = [next(word for word in turn if word in words) for turn in turns]
            said = re.findall(r"turn_direction\(([^()]+)\)", text.split("Route:")[1])
            equal((len(said), text[-9:]), (len(right), '"stop()"}'), text)
            counts.update(walks=1, turns=len(said), wrong=sum(a != b for a, b in zip(said, right)))
        for answer in answers:
            observation, line, action = json.loads(answer).values()
            assert line in lines and (look or f"Now: {observation}\n" in text), f"{answer} in {text}"
            word = re.fullmatch(r"forward\(\)|stop\(\)|turn_direction\((.+)\)", action)[1]
            equal((word is None or word in words, bool(word)), (True, "urn " in line), answer)
        assert not re.search(", that is |on to the ", str(doc)), f"the expert's own words: {doc}"
    shares(counts, (.12, "words chat", 9000, .18), (.14, "walks", 9000, .2),
           (.08, "wrong", counts["turns"], .12), (.1, "words letters", 9000, 1),
           (.1, "words clock", 9000, 1), (.25, "words id", 9000, 1), (.25, "words ood", 9000, 1),
           (.12, "seen chat", 1500, .18), (.64, "seen caption", 1500, .72),
           (.08, "rare", 1500, .12), (.35, "misread", counts["rare"], .65), (.01, "words feedback", 9000, 1))
    equal(names, {"", *env_virl.LANDMARKS}, "landmarks in captions")
    for share, kind in ((1.0, list), (0.0, str)):
        documents = [env_virl.document(rng, share) for _ in range(50)]
        documents += [VIRL.picture_document(rng, share)[0]]
        equal({type(document) for document in documents}, {kind}, share)


def views_of(picture):
    """A picture -> its four views as int arrays, {"front": [side, side, 3], ...}."""
    pixels, side = np.asarray(picture, int), picture.width // 2
    return {view: pixels[i // 2 * side:][:side, i % 2 * side:][:, :side]
            for i, view in enumerate(env_virl.VIEWS)}


def test_virl_views_show_the_observation():
    """The landmark is only in the view of its side, the crossing in all four; cities differ in colour."""
    pairs = [(a + there, b + there, sides) for there in ("", f", {CROSS}") for a, b, sides in (
        (NONE, HOUSE, ["left"]), (NONE, HOUSE.replace("left", "right"), ["right"]),
        (HOUSE, HOUSE.replace("Inn", "Cafe"), ["left"]))]
    pairs += [(CROSS, f"{NONE}, {CROSS}", []), (CROSS, NONE, list(env_virl.VIEWS))]
    looks = env_virl.LOOKS.items()
    for (look, colours), pixels, (a, b, sides) in itertools.product(looks, (80, 81, 300), pairs):
        pictures = [env_virl.draw_picture(look, "Aldham", observation, "s", pixels) for observation in (a, b)]
        equal([picture.size for picture in pictures], [(pixels, pixels)] * 2, look)
        x, y = map(views_of, pictures)
        differ = [view for view in x if np.abs(x[view] - y[view])[1:-1, 1:-1].max() > 40]
        equal(differ, sides, (look, pixels, a, b))
        for view in x.values() if CROSS in a else ():  # white or yellow at the bottom
            bottom = view[int(0.85 * len(view)):int(0.95 * len(view))]
            zebra = (np.abs(bottom - colours["zebra"]).max(-1) < 40).mean()
            within(0.3, zebra, 0.7, (look, pixels, a, "zebra"))
            sky = env_virl.city_style(look, "Aldham")["sky"]
            far = np.abs(view[len(view) // 8, len(view) // 2] - sky).max()
            within(0, far, 12 if a == CROSS else 255, (look, pixels, a, "sky"))
    towns = [town for splits in env_virl.CITIES.values() for row in splits.values() for town in row]
    for look, colours in looks:
        styles = [env_virl.city_style(look, town) for town in towns]
        equal(len(set(map(str, styles))), 8, f"{look}: styles")
        equal({style["zebra"] for style in styles}, {colours["zebra"]}, f"{look}: zebra crossings")
        walls = np.array([style["walls"] for style in styles])
        within(1, np.abs(walls - colours["walls"]).max(), 25, "walls")


def test_virl_landmarks_can_be_told_apart():
    """At 80 pixels any two of the 60 differ clearly, and one drawn anew is known within 5 pixels."""
    for look in env_virl.LOOKS:
        pictures = ([env_virl.draw_picture(look, "Corvale", f"{name} is on your right", seed and seed + name)
                     for name in env_virl.LANDMARKS] for seed in ("", "1"))
        a, b = (np.stack([views_of(p)["right"].mean(-1) for p in row]) for row in pictures)  # [60, 40, 40]
        apart = np.array([[(np.abs(x - y) > 60).sum() for y in a] for x in a]) + 10 ** 6 * np.eye(60)
        within(61, apart.min(), 1600, f"{look}: pixels, of 1600, in which the closest two differ")
        best = np.full((60, 60), np.inf)
        for down, right in itertools.product(range(-5, 6), range(-4, 5)):
            moved = np.roll(a, (down, right), (1, 2))[:, 8:24, 4:36].reshape(60, -1)
            distance = np.abs(b[:, None, 8:24, 4:36].reshape(60, 1, -1) - moved[None]).mean(-1)
            best = np.minimum(best, distance)
        within(0.95, (best.argmin(1) == np.arange(60)).mean(), 1, f"{look}: known")


# ------------------------------------------------------------------------------------------------------------
# env_virl.py: the released format, made here. Names are as they come: quotes, braces, commas, many scripts.

NAMES = ['Joe\'s "Best" Deli', "Smith, Sons & Co.", "{Brackets} Bar", "東京ラーメン", "Кафе «Пушкин»", "مطعم",
         "The Intersection Inn", "$5 Pizza \\ More", "A bar where Turn"]
ROUTES, MAPPING, PICTURE, ANGLE = (
    "route_infos.json", "gps_pano_mapping.pkl", "street_views/pano.jpg", "street_views/pano.metadata.json")


def released_route(points, headings, landmarks, init_heading=0):
    """An entry of route_infos.json. headings, landmarks: one for each leg, as milestone_info has them."""
    block = ('{{\n"intersection_idx": {},\n"landmarks": "{}",\n"distance": "{} meters",\n\n'
             '"human_heading": "{}",\n"to_next_intersection_heading": "{}",\n}},\n')
    listed = [None if text == "No landmark nearby" else
              {"name": text.split(" is ")[0], "geocode": point, "spatial_relation": "x", "expression": "x"}
              for text, point in zip(landmarks[:-1], points[1:])]
    blocks = zip(range(1, 99), landmarks, range(16, 99), ["0", *headings], headings)
    return {"start_place": {"relocated_geocode": points[0]}, "init_heading": init_heading,
            "dest_place": {"name": "X"},
            "route_results": {"geocode_list": points[1:], "landmark_list": listed},
            "milestone_info": "".join(block.format(*values) for values in blocks)}


def virl_points(k):
    """Three legs: north, east, north. Odd k have a first leg of under 5 m."""
    south, north = 40.7 + 0.01 * k, 40.7 + 0.01 * k + (0.00002 if k % 2 else 0.001)
    return [(south, -74.0), (north, -74.0), (north, -73.999), (north + 0.001, -73.999)]


def virl_route(k):
    """Odd k have headings of exactly 0 and 360."""
    a, b, c = (NAMES[(k + i) % 9] for i in range(3))
    headings = (["0 (north)", "90 (east)", "360 (north)"] if k % 2 else
                ["359 (north)", "91.5 (east)", "318 (northwest)"])
    landmarks = [f"{a} is on your right", f"{b} is on your left" if k % 3 else "No landmark nearby",
                 f"The destination {c} is on your left"]
    return released_route(virl_points(k), headings, landmarks, (0, 360, 45)[k % 3])


def write_data(path, routes, mapping=None, rotation=0):
    """A data folder with one street view, "pano" -> path."""
    put(path, ROUTES, json.dumps([routes, 7]).encode())
    put(path, ANGLE, b'{"rotation": %f}' % rotation)
    put(path, MAPPING, mapping and pickle.dumps(mapping))
    Image.effect_noise((720, 360), 99).resize((720, 360), box=(0, 0, 9, 9)).save(f"{path}/{PICTURE}")
    return path


def read_one(*route, mapping=None):
    """What the loader makes of one route, with pictures if there is a mapping."""
    with folder() as path:
        write_data(path, [released_route(*route)], mapping)
        return env_virl.load_routes(path, bool(mapping))["all"][0]


def test_virl_real_routes():
    """The numbers of two routes of the release: n geocodes after the start are n legs, all of them walked."""
    for points, words, places in (
            ([[40.724162, -73.997626], [40.724229, -73.997790], [40.723023, -73.998800],
              [40.722715, -73.998098]], ["298 (northwest)", "212 (southwest)", "120 (southeast)"],
             ["A is on your front", "B is on your left"]),
            ([[40.72, -73.99], [40.71991, -73.99061], [40.71853, -73.99029]], ["259 (west)", "170 (south)"],
             ["D is on your left behind"])):
        end = "C is on your left"
        read = read_one(points, words, [*places, f"The destination {end}"], 30)
        walked = [(list(p.point), p.landmark) for p in read.places]
        equal(walked, list(zip(points, [None, *places, end])), "places")
        positions = env_virl.walk(read, random.Random(0))[1]
        turns, faced = [p for p in positions if p.turn], [30, *(float(word.split(" ")[0]) for word in words)]
        said = [[env_virl.action_text(p, rule) for p in turns] for rule in RULES]
        lefts = ["turn_direction(left)"] * len(words)  # by 92, 86 and 92 degrees; by 131 and 89
        equal(said, [[f"turn_direction{word.split(' ')[1]}" for word in words], lefts], "turns")
        equal([(p.heading, p.turn) for p in turns], [*zip(faced, zip(faced, faced[1:]))], "headings")
        ahead = [p.heading for p in positions if not p.turn]
        equal((ahead, {*ahead}), (sorted(ahead, key=faced.index), {*faced[1:]}), "headings of the legs")
        shown = [next(p.observation for p in positions if p.point == place.point) for place in read.places]
        equal(shown, [NONE, *(f"{place}, {CROSS}" for place in places), end], "observations")
        refused(f"milestone_info.to_next_intersection_heading: block 0: {words[0].split()[0]} degrees",
                lambda: read_one(points[1:], words[:-1], [*places[1:], f"The destination {end}"]))
    north = [[40.0, -74.0], [40.001, -74.0], [40.00102, -74.0]]
    near_by = ["A is on your left", "The destination B is on your left"]
    read_one(north, ["44 (x)", "90 (east)"], near_by)  # 44 degrees off; and a leg of 2 m may head anywhere
    refused("block 0", lambda: read_one(north, ["46 (x)", "0 (north)"], near_by))


def test_virl_released_format():
    """All routes are read and played, with any names. Of headings 360 is north and 0 is unset. Up to five
    steps lie between places, none in a leg of under 5 m. Prompts show all steps."""
    with folder() as path:
        write_data(path, [virl_route(k) for k in range(30)])
        facings, steps, names = [set(), set(), set()], [[], []], {}
        for rule, split in itertools.product(RULES, ("train", "unseen")):
            env = VIRL(rule=rule, split=split, data=path, verify=1)
            within(201, expert_plays(env, 20), 999, (rule, split))
            names[split] = {route.name for route in env.routes}
            for i in range(150):
                [prompt, *_], _, _ = sft.demonstrations(env, i)[-1]
                k = int(env.route.name[6:])
                a, b, c = (NAMES[(k + i) % 9] for i in range(3))
                goals = (f"next intersection where {a} is on your right",
                         f"next intersection where {b} is on your left" if k % 3 else "next intersection",
                         f"destination where {c} is on your left")
                moves = [f"Move forward until you reach {goal}." for goal in goals]
                equal(env.instructions[1::2], moves, k)
                walked = [p.instruction for p in env.positions if p.action == "forward()"]
                first, *others = (walked.count(line) - 1 for line in moves)
                steps[k % 2].append(first)
                steps[0].extend(others)
                facings[k % 3].add(env.positions[0].turn[0])
                assert k % 2 == 0 or env.instructions[0].endswith("to face north."), env.instructions
                crossings = [place.point for place in env.route.places[1:-1]]
                for p in env.positions:
                    equal(CROSS in p.observation, p.point in crossings, k)
                past = re.search("Last steps: (.*)\nNow: ", prompt["content"])[1]
                equal(past.count("; "), len(env.positions) - 2, past)
        equal(names["train"] & names["unseen"], set(), "routes of both splits")
        equal(len(names["train"] | names["unseen"]), 30, "routes")
        equal((facings[1:], set(steps[1]), set(steps[0])), ([{360}, {45}], {0}, set(range(6))), "steps")
        within(51, len(facings[0]), 360, "headings drawn")
        within(2.2, sum(steps[0]) / len(steps[0]), 2.7, "mean number of steps")
    text = ('[{\n "intersection_idx": 0,\n"landmarks": "A \\"B\\" {C}, D: is on your left",\r\n'
            '"distance": "1 meters"}\n,\n{"distance" : "2 meters"\n\n"landmarks": "{", },\n'
            '{"landmarks": "The "Q"",\n "other": 3 , }, ]')
    equal(env_virl.milestones(text), [
        {"intersection_idx": "0", "landmarks": 'A "B" {C}, D: is on your left', "distance": "1 meters"},
        {"distance": "2 meters", "landmarks": "{"}, {"landmarks": 'The "Q"', "other": "3"}], text)


def test_virl_optional_keys():
    """A route may lack whatever a walk can do without; then the default is played."""
    def read(change):
        entry = virl_route(4)
        change(entry)
        return env_virl.read_route(entry, "route")

    def without(key, rest=".*"):  # in the blocks
        def change(entry):
            entry["milestone_info"], count = re.subn(f'"{key}": {rest}\n', "", entry["milestone_info"])
            within(2, count, 3, key)
        return change
    whole = read(lambda entry: None)
    unread = [without(key) for key in ("distance", "human_heading", "intersection_idx")]
    unread += [lambda entry: entry.pop("dest_place"),
               lambda entry: entry["route_results"].pop("landmark_list")]
    for change in (*unread, lambda entry: [change(entry) for change in unread]):
        equal(read(change), whole, "without a key that is not read")
    equal(read(lambda entry: entry.pop("init_heading")), whole._replace(facing=None), "no init_heading")
    places = read(without("landmarks", '"(?!The dest).*')).places
    equal([place.landmark for place in places], [None] * 3 + [whole.places[3].landmark], "no landmarks")
    with folder() as path:
        put(path, ROUTES, json.dumps([[virl_route(4)]]).encode())  # without the index
        equal(env_virl.load_routes(path)["all"], [whole._replace(name="route 0")], "no index")


def test_virl_steps_between_are_left_out():
    """No step lies within 8 m of a leg's end or, with pictures, farther than 20 m from a panorama."""
    for length, panoramas, kept in (
            (4, None, []), (15, None, [1, 2]), (30, None, [1, 2, 3, 4]), (60, None, [1, 2, 3, 4, 5]),
            (15, [0], [1, 2]), (90, [0, 90], [1, 5]), (90, [0, 45, 90], [1, 2, 3, 4, 5])):
        points = {meters: (40.7 + meters / 111_195, -74.0) for meters in (0, 45, 90, length)}
        ends, mapping = [points[0], points[length]], panoramas and {points[at]: "pano" for at in panoramas}
        read = read_one(ends, ["0 (north)"], ["The destination X is on your left"], mapping=mapping)
        at = [round(6 * (p[0] - 40.7) / length * 111_195) for p in read.between[0]]  # in sixths of the leg
        equal(at, kept, (length, panoramas))


def test_virl_ood_routes_are_played_in_order():
    """With data, the visual variation's routes have numbers. No split has a route of another one."""
    with folder() as path:
        write_data(path, [virl_route(k) for k in range(20)])
        write_data(f"{path}/ood", [virl_route(k) for k in range(30, 48)])
        env = VIRL(data=path, visual="ood", split="all")

        def play(i):
            one = VIRL(data=path, visual="ood", split="all", route=i)
            one.reset(f"eval/{i}")
            return one.route.name, one.positions
        routes, again = (list(map(play, range(36))) for _ in "12")
        equal([name for name, _ in routes], [f"route {i}" for i in range(18)] * 2, "order")
        equal((env.fixed_routes, again), (18, routes), "number of routes, the same once more")
        within(7, len({positions[0].turn[0] for _, positions in routes[::3]}), 12, "headings drawn")
        drawn = [(env.reset(seed), env.route.name)[1] for seed in (None, 1, "x", "eval/7", *range(20))]
        within(4, len(set(drawn)), 18, "routes drawn")
        for more in ({}, {"data": path}, {"split": "all"}):
            refused("needs data and split='all'", lambda: VIRL(route=0, **more))
        for more in ({}, {"data": path, "visual": "ood"}, {"data": path}, {"visual": "ood", "split": "all"}):
            equal(VIRL(**more).fixed_routes, None, more)
        for look in RULES:  # whichever is trained on: its ID has no route of it
            train, unseen, whole = ({r.name for r in VIRL(data=path, visual=look, split=split).routes}
                                    for split in ("train", "unseen", "all"))
            equal((train & unseen, train | unseen), (set(), whole), look)


def pickled(function, *arguments):
    """An object that is pickled as the call of a function."""
    return type("Call", (), {"__reduce__": lambda self: (function, arguments)})()


def damaged_entries():
    """Yield (a damaged entry of route_infos.json, words of the error)."""
    start, points = "start_place.relocated_geocode", "route_results.geocode_list"
    nan, whole = math.nan, virl_route(3)["milestone_info"]

    def changed(key, value):
        """virl_route(3) with another value, "gone" for none, at a key: route_results.geocode_list, say."""
        entry = virl_route(3)
        *outer, inner = key.split(".")
        place = entry[outer[0]] if outer else entry
        place[inner] = value
        if value == "gone":
            del place[inner]
        return entry
    for entry in (None, 7, [], "x", [{}]):
        yield entry, f"{start}: cannot be read"
    yield {}, f"{start}: 'start_place' is missing"
    for key in (start, points, "init_heading", "milestone_info", "start_place", "route_results"):
        for value in (None, "x", [1], [1, 2, 3], [91, 0], [0, 181], [nan, 0], [0, 1e999], True, 1e999, nan,
                      999, {"a": 1}, *["gone"] * (key != "init_heading")):
            yield changed(key, value), key
    yield changed(points, []), "milestone_info: 3 blocks for 0 legs"
    yield changed(points, [[1, 2]]), "milestone_info: 3 blocks for 1 legs"
    empty = {**virl_route(3), "route_results": {"geocode_list": []}, "milestone_info": ""}
    yield empty, "milestone_info: 0 blocks for 0 legs"
    nowhere, half, heading = "No landmark nearby", len(whole) // 2, '"to_next_intersection_heading": '
    for text in (whole * 2, whole[:half], whole[half:], whole.replace(nowhere, "\ud800 is on your left")):
        yield changed("milestone_info", text), "milestone_info"
    east, north = '"90 (east)"', '"360 (north)"'
    cases = [(0, "landmarks", "is on your right", "on your right"), (2, "landmarks", "The destination ", ""),
             (1, "landmarks", nowhere, ""), (2, "landmarks", '"landmarks": "The', '"landmark": "The')]
    cases += [(i, heading[1:-3], heading + old, new and heading + new) for i, old, new in (
        (1, east + ",", ""), (2, north + ",", ""), (1, east, '"(east)"'), (1, east, '"nan (east)"'),
        (1, east, '"136 (southeast)"'), (1, east, '"44 (northeast)"'),  # off by 46 degrees
        (1, east, '"270 (west)"'), (2, north, '"46 (northeast)"'), (2, north, '"180 (south)"'))]
    for i, key, old, new in cases:
        assert old in whole, old
        yield changed("milestone_info", whole.replace(old, new, 1)), f"milestone_info.{key}: block {i}: "


def damaged_mappings(evil):
    """Yield (what gps_pano_mapping.pkl holds, words of the error)."""
    exact, scalar, lost = mapping_of(), np.float64(0).__reduce__()[0], virl_points(3)[2]
    floats, objects = np.dtype("f8"), np.dtype("O")

    def more(value, key=(1.0, 2.0)):
        return {**exact, key: value}
    for mapping in (mapping_of(0.00019), mapping_of(0, 0.00025), {}):  # 21 m off
        yield mapping, "geocode"
    yield {p: "pano" for p in exact if p != lost}, f"geocode {lost}: no panorama"
    for mapping in (evil, more(evil), more(pickled(scalar, [], evil))):
        yield mapping, "it holds posix.mkdir"
    for value in (evil, 7):
        yield more(pickled(scalar, objects, pickle.dumps(value))), "a scalar of dtype"
    for value in (np.complex64(1), np.bool_(1), np.str_("1")):
        yield more("x", (1.0, value)), "a scalar of dtype"
    yield more(pickled(scalar, floats, b"short")), "buffer size"
    yield more(np.sum), "it holds numpy.sum"
    yield more("x", (Fraction(1), 2.0)), "it holds fractions.Fraction"
    yield more(np.array([1.0])), "it holds numpy._core"
    for mapping in (pickle.dumps(exact)[:-20], b"cos\nsystem\n(S'true'\ntR.", b"\x80\x05\x95" + b"\xff" * 8,
                    None, 7, [1], {1: "x"}, {(1.0,): "x"}, {("a", "b"): "x"}, {(1.0, 2.0): 3},
                    {(91.0, 0.0): "x"}, {(math.nan, 0.0): "x"}, more("x", (1.0, floats))):
        yield mapping, ""


def damage(evil):
    """Yield (file, what it holds instead, words of the error): all damage to a folder of five routes."""
    for entry, words in damaged_entries():
        routes = [*map(virl_route, range(3)), entry, virl_route(4)]
        yield ROUTES, json.dumps([routes, 7]).encode(), f"route 3: {words}"
    for content in (b"[[], 0]", b"[1, 2]", b'[{"a": 1}, 2]'):
        yield ROUTES, content, "not [[route, ...], index]"
    for content in (b"{}", b"[]", b"null"):
        yield ROUTES, content, ""
    yield ROUTES, b"[[1]]", "route 0: start_place"
    for name, words in ((ROUTES, ""), (MAPPING, ""), (PICTURE, ""), (ANGLE, "rotation: ")):
        for content in (None, b"", b"junk", b"{", b"\xff\xfe", b"\xff\xd8\xff", b"[" * 100_000, b"9" * 5000):
            yield name, content, words
    for content in (b"[]", b"null", b"{}"):
        yield ANGLE, content, "rotation: "
    for value in (b'"x"', b"null", b"true", b"NaN", b"1e999", b"400", b"[1]"):
        yield ANGLE, b'{"rotation": %s}' % value, "rotation: "
    for mapping, words in damaged_mappings(evil):
        yield MAPPING, mapping if isinstance(mapping, bytes) else pickle.dumps(mapping), words


def mapping_of(up=0, right=0, kind=float):
    return {(kind(lat + up), kind(lng + right)): "pano" for k in range(5) for lat, lng in virl_points(k)}


def test_virl_damaged_data():
    """Each damage is one ValueError that names file, route and key. Nothing in a pickle runs."""
    with folder() as path:
        data = write_data(f"{path}/good", [virl_route(k) for k in range(5)], mapping_of())
        floats = mapping_of(kind=np.float64)
        old_numpy = pickle.dumps(floats, 3).replace(b"numpy._core", b"numpy.core")
        fine = [mapping_of(0.00017), mapping_of(0, 0.00023), floats, mapping_of(kind=np.float32),  # 19 m off
                {**floats, (np.int64(1), 2.0): "x"}, old_numpy]
        for i, mapping in enumerate(fine):
            here = shutil.copytree(data, f"{path}/fine{i}")
            put(here, MAPPING, mapping if isinstance(mapping, bytes) else pickle.dumps(mapping))
            equal(len(env_virl.load_routes(here, True)["all"]), 5, "routes")
        for i, (name, content, words) in enumerate(damage(pickled(os.mkdir, f"{path}/evil"))):
            here = shutil.copytree(data, f"{path}/{i}")
            put(here, name, content)
            try:
                refused(f"{here}/{name}: {words}", lambda: VIRL(data=here, vl=True))
            except Exception as e:
                raise AssertionError(f"{name} = {content!r:.60}: {e}") from None
            assert not os.path.exists(f"{path}/evil"), f"{content!r:.60} ran"
        places = {(0, 0): "a", (np.float64(0.0001), np.float32(0.0)): np.int64(5)}
        near = write_data(f"{path}/near", [virl_route(3)], places)
        for name, kind in itertools.product("a5", ("jpg", "metadata.json")):
            shutil.copy(f"{near}/street_views/pano.{kind}", f"{near}/street_views/{name}.{kind}")
        found = [env_virl.street_view((lat, 0.0), near) for lat in (0.0, 0.00006, -0.0001, 0.001)]
        nearest = [(f"{near}/street_views/{name}.jpg", 0) for name in "a5a"]
        equal(found, nearest + [None], "the nearest within 20 m")
        refused(f"{near}/{ROUTES}: route 0: {near}/{MAPPING}: geocode {virl_points(3)[0]}",
                lambda: VIRL(data=near, vl=True))
        equal(len(VIRL(data=near, split="all").routes), 1, "text needs no panoramas")
        os.truncate(f"{data}/{PICTURE}", 1500)
        env = VIRL(data=data, vl=True)  # its header can be read
        raises(env_virl.DataError, f"{data}/{PICTURE}: cannot be read", lambda: env.reset(0))
        refused(f"{data}/ood/{ROUTES}: cannot be read", lambda: VIRL(data=data, visual="ood"))
        write_data(f"{path}/one", [virl_route(1)])
        split = "unseen" if env_virl.load_routes(f"{path}/one")["train"] else "train"
        refused(f"none is in the {split} split", lambda: VIRL(split=split, data=f"{path}/one"))


def test_virl_projection():
    """Each pixel of a view shows the heading atan(x) and the height atan(y / hypot(1, x)) off the centre."""
    rows = (np.arange(720) + 0.5)[:, None] / 720 * 255  # blue: 0 is up, 255 down
    for rotation, heading, side in itertools.product(
            (0, 37.5, -90, 200, 360), (0, 1, 45, 90, 179.9, 298, 359.5, 405, -30), (41, 40)):
        compass = np.radians((np.arange(1440) + 0.5) / 4 - rotation)[None]  # red: its cosine, green: its sine
        channels = np.broadcast_arrays(127.5 + 127.5 * np.cos(compass), 127.5 + 127.5 * np.sin(compass), rows)
        panorama = np.stack(channels, -1).round().astype(np.uint8)
        view = env_virl.perspective(panorama, heading, rotation, side)
        equal((view.shape, view.dtype), ((side, side, 3), np.uint8), side)
        red, green, blue = (view.astype(float) / 127.5 - 1).transpose(2, 0, 1)
        x = (np.arange(side) * 2 + 1 - side) / side
        off = np.degrees(np.arctan2(green, red)) - heading - np.degrees(np.arctan(x))[None]
        off = (off + 180) % 360 - 180
        high = -90 * blue - np.degrees(np.arctan2(-x[:, None], np.hypot(1, x[None])))
        within(0, max(np.abs(off).max(), np.abs(high).max()), 0.6, (rotation, heading, side))
    ramp = np.zeros((8, 16, 3), np.uint8)
    ramp[:, 0], ramp[:, -1] = 200, 100  # the seam lies between these: half of each
    for heading, rotation, grey in ((0, 0, 150), (350, 10, 150), (11.25, 0, 200), (-11.25, 0, 100)):
        equal(env_virl.perspective(ramp, heading, rotation, 1).tolist(), [[[grey] * 3]], (heading, rotation))


def test_virl_street_views():
    """Four projections of the panorama at the place, by the walker's heading and the panorama's rotation."""
    with folder() as path:
        for name, visual, pixels, rotation in ((path, "id", 80, 70), (f"{path}/ood", "ood", 34, -15.5)):
            write_data(name, [virl_route(k) for k in range(5)], mapping_of(), rotation)
            env = VIRL(data=path, visual=visual, vl=True, pixels=pixels)
            panorama = env_virl.load_panorama(f"{name}/{PICTURE}", pixels // 2)
            equal(panorama.shape, (2 * pixels, 4 * pixels, 3), "no larger than views show")
            for i in range(6):
                for (_, [image], _), position in zip(sft.demonstrations(env, i), env.positions, strict=True):
                    views = [env_virl.perspective(panorama, position.heading + turn, rotation, pixels // 2)
                             for turn in (0, 90, 180, 270)]
                    for a, b in zip(views_of(image).values(), views, strict=True):
                        equal((a != b).sum(), 0, "pixels that differ")


# ------------------------------------------------------------------------------------------------------------
# Tokens and rollouts (eval.py). What holds for one family of models holds for all, with pictures and without.

def test_glue_equals_the_template():
    """prompt + answer + glue is the template's own rendering, cut or not. SFT's row is prompt + answer."""
    for family in FAMILIES:
        model, tok = tiny(family)
        env = world(family, 0, 3)
        messages, images = env.reset(0)
        answer, first = ev.answer_ids(tok, model, "hello"), ev.prompt(tok, messages, images)
        row = sft.demonstration_row(tok, model, messages, images, "hello")
        equal(answer, ids_of(tok, "hello") + [tok.eos_token_id], f"{family}: answer")
        expected = first.ids + answer, [0] * len(first.ids) + [1] * len(answer)
        equal((row.ids, row.action_mask), expected, f"{family}: a row of SFT")
        assert same(row.pictures, first.pictures), family
        step = env.step("hello")
        whole = ev.prompt(tok, step.messages, step.images).ids
        equal(row.ids + ev.glue_ids(tok, step.messages, answer[-1]), whole, family)
        equal(row.ids[:-1] + ev.glue_ids(tok, step.messages), whole, f"{family}, cut")


def test_score_is_what_was_sampled():
    """A segment has the very ids that generate() read and sampled, even where its text has other tokens too.
    What was sampled is an action; a turn's last one has the reward. score() gives generate()'s log-probs and
    entropies, left padding or not."""
    ended = set()
    for family, temperature in itertools.product(FAMILIES, (1.0, 0.7)):
        model, tok = tiny(family)
        calls, generate, ambiguous = [], type(model).generate, 0

        def spy(self, **kw):
            kw["generation_config"].output_scores = True
            out = generate(self, **kw)
            read = [ids[mask.bool()].tolist() for ids, mask in zip(kw["input_ids"], kw["attention_mask"])]
            sampled = out.sequences[:, kw["input_ids"].shape[1]:]
            calls.append((read, sampled, torch.stack(out.scores, 1).log_softmax(-1)))
            return out
        with mock.patch.object(type(model), "generate", spy):
            episodes = played(family, 5, temperature)
        equal([len(ids) for _, ids, _ in calls], [5] * 3, "conversations in each batch")
        for i, e in enumerate(episodes):
            [s], row = e.segments, ev.prompt(tok, *world(family, i, 3).reset(f"t{i}"))
            places = picture_places(model, s)
            assert same(s.pictures, row.pictures) and max(places, default=0) < len(row.ids)
            equal((bool(places), bool(row.pictures)), (family in PICTURES,) * 2, f"{family}: pictures")
            logp, entropy, _ = ev.score(model, [s], tok.pad_token_id, cpu(), temperature)
            for turn, ((read, ids, logprobs), t) in enumerate(zip(calls, e.turns, strict=True)):
                assert family in PICTURES or torch.isfinite(logprobs).all(), "top-k or top-p is on"
                what = f"{family}, T = {temperature}, turn {turn}"
                row.add(read[i][len(row.ids):], 0)
                equal(row.ids, read[i], f"{what}: what was read")
                at, n, sampled = sum(row.action_mask), t["tokens"], ids[i, :t["tokens"]].tolist()
                row.add(sampled, 1)
                row.reward[-1] = t["reward"]
                ends = [token in model.generation_config.eos_token_id for token in sampled]
                equal(ends, [False] * (n - 1) + [not t["cut"]], f"{what}: end tokens")
                text = sampled if t["cut"] else sampled[:-1]
                equal(tok.decode(text), t["text"], what)
                ambiguous += ids_of(tok, t["text"]) != text
                full = logprobs[i, :n]
                near(logp[at:at + n], full[range(n), sampled], 2e-4, f"{what}: log-probs")
                expected = -(full.exp() * full.clamp(min=-1e9)).sum(-1)
                near(entropy[at:at + n], expected, 1e-3, f"{what}: entropy")
                ended.add(t["cut"])
            equal(s.ids, row.ids, f"{family}: ids")
            equal((s.action_mask, s.reward), (row.action_mask, row.reward), f"{family}: actions and rewards")
            equal(len(logp), sum(s.action_mask), f"{family}: actions, and no other token, are scored")
        assert ambiguous, "the sample was not ambiguous, so the test showed nothing"
    equal(ended, {True, False}, "the sample's answers that were cut, and that were not")


def test_score_of_a_batch():
    """A batch's scores are its rows' alone, and by hand: token t by position t - 1. Pictures matter."""
    for family in FAMILIES:
        model, tok = tiny(family)
        segments, pad = [e.segments[0] for e in played(family, 5)], tok.pad_token_id
        head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1)
        together = ev.score(model, segments, pad, cpu(), 1.0, head)
        alone = [ev.score(model, [s], pad, cpu(), 1.0, head) for s in segments]
        for i, what in enumerate(("log-probs", "entropies", "values")):
            near(together[i], torch.cat([a[i] for a in alone]), 1e-4, f"{family}: {what}")
        said = []
        for s in segments:
            logprobs = model(**ev.collate([s], 0, "cpu")[0]).logits[0].log_softmax(-1)
            said += [logprobs[t - 1, s.ids[t]].item() for t, action in enumerate(s.action_mask) if action]
        near(sft.sft_loss(model, segments, 10, pad, cpu()), -sum(said) / 10, 1e-4, f"{family}: loss")
        if family in PICTURES:
            swapped = [ev.Segment(s.ids, s.action_mask, s.reward, segments[i - 1].pictures)
                       for i, s in enumerate(segments)]
            other = ev.score(model, swapped, pad, cpu())[0]
            assert (other - together[0]).abs().max() > 1e-3, f"{family} does not see its pictures"
        else:  # those that see cannot say an image's place
            near(together[0], said, 1e-5, f"{family}: log-probs, by hand")


def test_tiny_first_layer_sees_four_tokens():
    """V-IRL's first layer sees a token and the three before it, the last layer all of them."""
    model, tok = tiny("virl")
    ids = torch.arange(40, 60)[None]
    for far in range(1, 8):
        other = ids.clone()
        other[0, -1 - far] = 99
        with torch.no_grad():
            a, b = (model(x, output_hidden_states=True).hidden_states for x in (ids, other))
        differs = [bool((a[layer][0, -1] != b[layer][0, -1]).any()) for layer in (1, -1)]
        equal(differs, [far < 4, True], f"first and last layer see the token {far} back")


def test_feedback_gets_no_gradient():
    """Both losses come from position t - 1 of every action token t; from no prompt, feedback or picture."""
    for family in FAMILIES:
        model, tok = tiny(family)
        [s], hidden = played(family, 1)[0].segments, []  # hidden: last hidden states, [1, T, H]
        assert 0 in s.action_mask[s.action_mask.index(1):], "no feedback in the sample"

        def keep(module, inputs, out):
            out[0].retain_grad()
            hidden.append(out[0])
        hook = model.model.register_forward_hook(keep)
        for loss in (lambda: ev.score(model, [s], 0, cpu())[0].sum(),
                     lambda: sft.sft_loss(model, [s], 1, 0, cpu())):
            loss().backward()
            touched = hidden[-1].grad[0].abs().sum(-1) > 0
            expected = [bool(a) for a in s.action_mask[1:]] + [False]
            equal(touched.tolist(), expected, f"{family}: places with a gradient")
        hook.remove()
        model.zero_grad()


def test_batches():
    """Rollouts: 256 rows, or 131,072 tokens, or 2^28 numbers in pictures; greedily the cut does not matter.
    Updates: each segment once, shortest first; padded, a part fits the budget or is one segment."""
    model, tok = tiny()
    runs = []
    for size in (5, 2):
        envs = [GeneralPoints(verify=2) for _ in range(5)]
        with mock.patch.object(ev, "batch_size", lambda *_: size):
            runs.append(ev.rollout(model, tok, envs, range(5), 0, 12, cpu()))
    equal(*([e.segments[0].ids for e in run] for run in runs))
    short, long = ev.Segment([0] * 10), ev.Segment([0] * 1900)
    for segments, new, rows in (([short, long], 148, 64), ([short], 50, 256), ([short, long], 10 ** 6, 1)):
        equal(ev.batch_size(segments, new), rows, "rows by tokens")
    short.pictures = {"pixel_values": torch.empty(1, 4, 3, 560, 560, device="meta")}
    equal(ev.batch_size([short, long], 0), 68, "rows by tokens and pictures")
    equal(ev.batch_size([short], 0), 2 ** 28 // (12 * 560 * 560), "rows by pictures")
    rng = random.Random(0)
    for budget in (1, 50, 400, 10 ** 9):
        segments = [ev.Segment([0] * rng.randint(1, 100)) for _ in range(60)]
        parts, weights = zip(*sft.micro_batches(segments, budget, cpu()))
        equal(set(weights), {1.0}, "weights of one process")
        equal(sorted(id(s) for part in parts for s in part), sorted(map(id, segments)), "segments")
        lengths = [[len(s.ids) for s in part] for part in parts]
        equal(sum(lengths, []), sorted(len(s.ids) for s in segments), "lengths in order")
        assert all(len(part) == 1 or max(part) * len(part) <= budget for part in lengths), (budget, lengths)
        for part, after in zip(lengths, lengths[1:]):
            assert after[0] * (len(part) + 1) > budget, f"budget {budget}: {after[0]} had room in {part}"


def test_later_attempts_go_on_from_the_cache():
    """Episodes are the same as without the cache, and the compute counts what is read. It is used where a
    conversation goes on, but not behind a sliding window, nor with other pictures than LLaVA's."""
    def cached(family):
        """-> (episodes, for each call of generate() whether it had a cache)."""
        kind, calls = type(tiny(family)[0]), []
        with watching(kind, "generate", lambda *_, **inputs: calls.append("cache" in inputs)):
            return played(family, 5), calls
    for family, used in (("gp", True), ("llava", True), ("virl", False), ("gpt_neo", False),
                         ("qwen2_5_vl", False)):
        episodes, calls = cached(family)
        equal((calls[0], any(calls)), (False, used), f"{family}: is a cache used at first, later")
        with mock.patch.object(ev, "continued", lambda *_: None):
            again, _ = cached(family)
        equal(*([[s.ids for s in e.segments] for e in run] for run in (episodes, again)), family)
        assert used == all(a.forwarded < b.forwarded for a, b in zip(episodes, again)), family
    kind = type(tiny("gp")[0])
    real = kind.forward

    def deaf(self, input_ids=None, attention_mask=None, **more):
        return real(self, input_ids=input_ids, attention_mask=attention_mask, **more)
    with mock.patch.object(kind, "forward", deaf):
        equal(any(cached("gp")[1]), False, "is a cache used by a model whose forward() takes no positions")
    nothing = SimpleNamespace(cache=SimpleNamespace(layers=[]))  # openai-gpt's: this model has no cache
    inputs = {"input_ids": torch.zeros(1, 1), "attention_mask": torch.ones(1, 1)}
    equal(ev.continued(tiny("gp")[0], nothing, inputs, [(0, 1, [5], None)], 0), None, "from an empty cache")


def test_buffered_cache():
    """The cache that generate() makes hands out what transformers' own does, wherever its room ends, and after
    rows or columns have been taken out. New tokens are written into its room: nothing is copied."""
    torch.manual_seed(0)
    ours, theirs = ev.BufferedLayer(), DynamicLayer()

    def update(rows, tokens):
        new = torch.rand(2, rows, 2, tokens, 4)
        for name, x, y in zip(("keys", "values"), ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(x, y), f"{name}, {rows} rows, {tokens} tokens more"
    kept = []
    for tokens in (21, *[1] * 64, 1, 1, 70, 1, 2):
        update(5, tokens)
        kept.append(ours.keys)
    places = [keys.data_ptr() for keys in kept]
    equal([places.index(p) for p in places], [0] * 65 + [65] * 2 + [67] * 3, "updates that needed a new buffer")
    for rows in ([4, 3, 2, 1, 0], [3, 1]):  # the first one: as many rows as before, in another order
        for layer in (ours, theirs):
            layer.batch_select_indices(torch.tensor(rows))
        update(len(rows), 3)
    for layer in (ours, theirs):
        layer.crop(-30)
    for tokens in (1, 40, 1):
        update(2, tokens)
    equal(ours.get_seq_length(), theirs.get_seq_length(), "length")

    model, tok = tiny("gp")
    inputs = ev.collate([ev.prompt(tok, [{"role": "user", "content": "?"}])], tok.pad_token_id, "cpu")[0]
    cache = hf.DynamicCache(config=model.config)
    for _ in range(2):
        loss = model(inputs["input_ids"], cache=cache, use_cache=True).logits.square().sum()
    torch.autograd.grad(loss, [*model.parameters()])  # raises if keys that it needs were written over
    out = ev.generate(model, inputs, ev.sampling(model, tok, 1.0, 2), cpu())
    equal({type(layer) for layer in out.cache.layers}, {ev.BufferedLayer}, "layers of generate()'s cache")


def test_rollout_of_the_expert():
    """A conversation a position, with feedback within. The player is wrong at first at some positions."""
    def choose(env):
        return "I cannot say." if env.attempts == 0 and len(env.expert()) % 3 == 0 else env.expert()
    for family, Env in (("gp", GeneralPoints), ("virl", VIRL)):
        model, tok = tiny(family)
        envs, attempts = [Env(rule=rule, split="unseen", seed=3) for rule in RULES for _ in range(3)], set()
        with speaking(model, tok, envs, choose):
            episodes = ev.rollout(model, tok, envs, range(6), 1.0, 64, cpu())
        for i, episode in enumerate(episodes):
            env = Env(rule=envs[i].rule, split="unseen", seed=3)
            messages, _ = env.reset(i)
            for s, turns in zip(episode.segments, episode.positions(), strict=True):
                row = ev.prompt(tok, messages)
                for turn in turns:
                    text = choose(env)
                    row.add(ids_of(tok, text) + [tok.eos_token_id], 1)
                    step = env.step(text)
                    row.reward[-1] = step.reward
                    equal((turn["text"], turn["cut"]), (text, False), "what was said, and whether it was cut")
                    if not step.info["position_done"]:
                        row.add(ev.glue_ids(tok, step.messages, tok.eos_token_id), 0)
                equal((s.ids, s.action_mask, s.reward), (row.ids, row.action_mask, row.reward), turns)
                attempts.add(len(turns))
                messages = step.messages
            equal((turns[-1]["success"], step.done), (True, True), "success, and the same end")
        equal(attempts, {1, 2}, f"{family}: attempts at a position")


def test_paper_answers():
    """Every answer counts, and the episode ends where the attempts at a position ran out."""
    for outcomes, expected in (([[1]], [1]), ([[0, 0]], [0, 0]), ([[0, 1], [1]], [0, 1, 1]), ([], []),
                               ([[1], [0, 0], [1]], [1, 0, 0]),
                               ([[0, 1], [0, 0], [0, 1], [1]], [0, 1, 0, 0])):
        turns = [{"position_solved": bool(right), "position_done": k == len(position) - 1}
                 for position in outcomes for k, right in enumerate(position)]
        equal(ev.paper_answers(ev.Episode(turns=turns).positions()), expected, f"positions {outcomes}")


def test_evaluate_counts_positions():
    """Each number, of a player who fails at position 0 once and at 2 always, at turns by the other rule."""
    routes = []

    def choose(env, seed):
        answer = env.expert()
        if env.at == env.attempts == 0:
            routes.append([position.turn is not None for position in env.positions])
        if env.at == 2 or env.at == env.attempts == 0:
            with mock.patch.object(env, "rule", "ood" if env.rule == "id" else "id"):
                other = env.expert()
            return other if other != answer else "{}"
        return answer
    args = parsed("--env virl --seed 7 --max_new_tokens 12")
    with acting(choose):
        cells = ev.evaluate(*tiny("virl"), args, cpu(), 30)
    for k, column in enumerate(("seen", "id", "ood")):
        cell, mine = cells[column], routes[30 * k:30 * k + 30]
        n, turns = sum(map(len, mine)), sum(map(sum, mine))
        first, second = (sum(route[at] for route in mine) for at in (0, 2))  # turns at positions 0 and 2
        assert first and second and turns < n
        for got, hits, of in ((cell, n - 30, n), (cell["first"], n - 60, n), (cell["episode"], 0, 30),
                              (cell["matters"], turns - second, turns),
                              (cell["matters"]["first"], turns - first - second, turns),
                              (cell["other_rule"], first + second, turns), (cell["paper"], 60, 150)):
            p = hits / of
            expected = [p, math.sqrt(p * (1 - p) / of), of]
            near([got["p"], got["se"], got["n"]], expected, 1e-9, f"{column}: p, error, n")
        near(cell["verdicts"]["correct"], (n - 60) / n, 1e-9, "share of right first answers")
        near(sum(cell["verdicts"].values()), 1, 1e-9, "shares of verdicts")


def test_evaluate_plays_each_column():
    """By its own rule, split and look, and by the flags; any --seed has the same hands. What was read counts
    at first answers, here of a player who reads all, and solves; reads all; reads three cards of four."""
    def choose(env, seed):
        number = int(seed.removeprefix("eval/"))
        if env.attempts == 0:
            met.append((env.rule, env.split, env.visual, env.verify, env.pixels))
            hands.append((number, env.cards))
        if env.attempts or number % 3 == 0:
            return env.expert()
        said = env.cards[:3] + [next(r for r in env_gp.RANKS if r != env.cards[3])] * (number % 3 == 2)
        return json.dumps({"cards": said if number % 3 == 2 else env.cards, "formula": "1"})
    other = {"id": "ood", "ood": "id"}
    for rule, look in itertools.product(RULES, repeat=2):
        dealt = []
        for seed in (0, 7):
            line = f"--vl --pixels 41 --verify 2 --rule {rule} --visual {look} --seed {seed}"
            met, hands, calls = [], [], []
            with acting(choose), watching(ev, "rollout", lambda *call, **_: calls.append(call[5:7])):
                args = parsed(f"{line} --temperature 0.3 --max_new_tokens 9")
                cells = ev.evaluate(None, None, args, cpu(), 6)
            dealt.append(hands)
            equal(calls, [(0.3, 9)], "temperature, longest answer")
            columns = {"seen": (rule, "train", look), "id": (rule, "unseen", look),
                       "ood": (other[rule], "faces", look), "visual": (rule, "unseen", other[look])}
            equal(met, [(*column, 2, 41) for column in columns.values() for _ in range(6)], line)
            equal([number for number, _ in hands], [*range(6)] * 4, "numbers of episodes")
            for column, cell in cells.items():
                read = cell["recognition"]
                near([cell["p"], read["p"], read["n"], read["whole"]["p"], read["whole"]["n"],
                      read["solved"]["p"], read["solved"]["n"]], [1, 11 / 12, 6, 2 / 3, 6, 1 / 2, 4], 1e-9,
                     f"{column}: solved; read, of; whole, of; solved among these, of")
        equal(*dealt, "the hands of two seeds")


# ------------------------------------------------------------------------------------------------------------
# PPO and the loops (rl.py, sft.py)

def test_gae_brute_force():
    """Against the double sum of the definition, with a discount of its own behind each token."""
    rng = torch.Generator().manual_seed(0)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.95), (1.0, 1.0), (0.7, 0.0), (0.5, 0.95)):
        rewards, values = torch.randn(2, 40, generator=rng, dtype=torch.float64)
        discounts = torch.where(torch.rand(40, generator=rng) < 0.3, gamma, 1.0).double()
        delta = rewards + discounts * torch.cat([values[1:], values.new_zeros(1)]) - values
        weight = lambda t, k: lam ** (k - t) * discounts[t:k].prod()
        expected = torch.stack([sum(weight(t, k) * delta[k] for k in range(t, 40)) for t in range(40)])
        advantages, returns = rl.gae(rewards, values, discounts, lam)
        near(advantages, expected, 1e-9, f"advantages, gamma {gamma}, lambda {lam}")
        near(returns, expected + values, 1e-9, "returns")


def test_gae_ignores_prompts_feedback_and_other_episodes():
    """Feedback in between changes nothing; an episode's conversations are joined, two episodes are not."""
    def estimate(*episodes):
        advantages = []
        for conversations in episodes:
            segments = [ev.Segment([7] * len(action), action, reward) for action, reward in conversations]
            for s in segments:
                n = sum(s.action_mask)
                s.logp, s.ref_logp = torch.zeros(n), torch.full((n,), 0.1)
                s.value = torch.linspace(0.3, 0.7, n)
            rl.estimate_advantages(ev.Episode(segments), 5.0, 0.1, 0.9, 0.8)
            advantages.append(rl.joined(segments, "advantage").tolist())
        return advantages
    two = [([0, 1, 1], [0, 0, -1.0]), ([0, 1], [0, 5.0])]  # one episode, two conversations
    plain = [([0, 1, 0, 1, 1], [0, -1.0, 0, 0, 5.0])]
    longer = [([0, 0, 1, 0, 0, 0, 1, 1, 0], [0, 0, -1.0, 0, 0, 0, 0, 5.0, 0])]
    alone, joined, padded = estimate(plain, two, longer)
    equal(padded, alone, "with a longer prompt and feedback")
    for last in (5.0, -3.0):  # of another episode
        equal(estimate(two, [([0, 1, 1, 1], [0, 0, -1.0, last])])[0], joined, "beside another episode")
    rewards = torch.tensor([0.01, -0.2 + 0.01, 1.01])      # beta 0.1, k1 = -0.1
    expected, _ = rl.gae(rewards, torch.tensor([0.3, 0.7, 0.3]), torch.tensor([1.0, 0.9, 0.9]), 0.8)
    near(joined, expected, 1e-6, "joined")


def test_token_rewards():
    """By hand: the verifier's reward / scale on an answer's last token, and -beta k1 on each."""
    s = ev.Segment([7] * 9, [0, 0, 1, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, -1.0, 0, 0, 0, 5.0])
    s.logp = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0])
    s.ref_logp = torch.tensor([-1.5, -1.0, -0.5, -3.5, -3.0])
    near(rl.token_rewards(s, 5.0, 0.1), [-0.05, 0.1, -0.2, -0.05, 1 - 0.2], 1e-6, "rewards")
    near(rl.token_rewards(s, 1.0, 0.0), [0, 0, -1.0, 0, 5.0], 1e-9, "rewards without KL")


def test_answer_discounts():
    """gamma behind an answer's last token, 1 within an answer."""
    for action, expected in (([0, 0, 1, 1, 1, 0, 0, 1, 1], [1, 1, 0.5, 1, 0.5]), ([0, 1], [0.5]),
                             ([0, 1, 1, 0, 0], [1, 0.5]), ([0, 1, 0, 1], [0.5, 0.5])):
        discounts = rl.answer_discounts(ev.Segment([7] * len(action), action), 0.5)
        equal(discounts.tolist(), expected, f"action {action}")


def test_whiten():
    """Mean 0 and variance 1; no variance gives zeros, not NaN."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 7 + 3
    near(rl.whiten(x, cpu()), (x - x.mean()) / x.std(unbiased=False), 1e-4)
    equal(rl.whiten(torch.full((5,), 2.0), cpu()).tolist(), [0] * 5)


def test_kl_estimators():
    """Over an exact small categorical both have the mean KL(p || q); k3 is never negative."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    k1, k3 = rl.kl_estimators(p.log(), q.log())
    near([(p * k1).sum(), (p * k3).sum()], [(p * (p / q).log()).sum()] * 2, 1e-12, "means of k1, k3")
    assert (k3 >= 0).all() and (k1 < 0).any(), (k1, k3)


def test_policy_loss_sign_cases():
    """The four cases of PPO's figure 1, value and gradient: ratio above / below the clip, advantage + / -."""
    for ratio, advantage, loss, slope in (
            (1.5, 1.0, -1.2, 0), (1.5, -1.0, 1.5, 1.5), (0.5, 1.0, -0.5, -0.5), (0.5, -1.0, 0.8, 0),
            (1.0, 2.0, -2.0, -2.0)):  # at ratio 1 it is the policy gradient
        logp = torch.tensor([math.log(ratio) - 3], requires_grad=True)
        out = rl.policy_loss(logp, torch.full((1,), -3.0), torch.tensor([advantage]), 0.2)
        out.sum().backward()
        what = f"loss, gradient at ratio {ratio}, advantage {advantage}"
        near([out.item(), logp.grad.item()], [loss, slope], 1e-5, what)


def test_value_loss_takes_the_worse():
    """Half the squared error of the value or of the clipped value: the larger one."""
    for value, target, error in ((1.0, 1.0, 0.8), (1.0, -1.0, 2.0), (0.1, 1.0, 0.9), (-1.0, -1.0, 0.8)):
        loss = rl.value_loss(torch.tensor([value]), torch.tensor([0.0]), torch.tensor([target]), 0.2)
        near(loss.item(), 0.5 * error ** 2, 1e-6, f"value 0 -> {value}, return {target}")


def test_ppo_starts_at_ratio_one():
    """The first policy is what sampled, and is the reference. Then it moves and the reference does not."""
    with folder(init=True) as out:
        quick(rl.main, flags(out, 3, 12, minibatches=1, epochs=1, lr="1e-3", beta=0))
        log = records(f"{out}/gp/id/rl", "reward")
        for r in log:
            assert r["ratio_error"] < 1e-5 and r["approx_kl"] < 1e-10 and r["clip_fraction"] == 0, r
        equal([(r["kl1"] == 0, r["kl3"] == 0) for r in log], [(True, True)] + [(False, False)] * 2, "KL is 0")
        assert all(r["kl3"] > 0 for r in log[1:]), log
        assert not same(weights(f"{out}/gp/id/init"), weights(f"{out}/gp/id/rl"))


def test_target_kl_stops_the_epochs():
    """A step that leads too far is the iteration's last: the next minibatch sees it and takes no step."""
    with folder(init=True) as out:
        for name, lr, target, expected in (("far", 0.1, 0.05, 1), ("near", 1e-7, 0.05, 16),  # 4 epochs x 4
                                           ("free", 0.1, 1e9, 16)):
            steps = []
            with mock.patch.dict(rl.PPO, target_kl=target), \
                    watching(rl, "clip_and_step", lambda *call: steps.append(call)):
                quick(rl.main, flags(out, batch=8, name=name, lr=lr))
            [record] = records(f"{out}/gp/id/{name}", "reward")
            equal([len(steps), record["updates"]], [expected] * 2, f"{name}: steps taken, updates logged")
            assert (record["approx_kl"] < 1e-4) == (name != "free"), record  # the mean over the steps taken


def test_pretraining_rows_hold_whole_documents():
    """Rows are full; only a long document is cut; first tokens and image places have no loss."""
    for name, share in itertools.product(("gp", "virl"), (0.0, 0.5)):
        tok = sft.build_tiny(name, 0, vl=share > 0)[1]
        image, width = tok.convert_tokens_to_ids("<image>") if share else None, (128, 256)[share > 0]
        args = SimpleNamespace(batch=20, row_tokens=width, chat_share=0.1, picture_share=share, pixels=80,
                               visual="id")
        rows = sft.pretraining_rows(args, ev.ENVS[name], tok, random.Random(0))
        equal(len(rows), 20)
        for r in rows:
            assert len(r.ids) <= width
            with_loss = [int(i > 0 and token != image) for i, token in enumerate(r.ids)]
            equal(r.action_mask, with_loss, "tokens with loss")
            shown = r.pictures["pixel_values"].shape[0] if r.pictures else 0
            equal(shown, r.ids.count(image) / 16, "pictures in a row")
        if name == "gp":
            assert sum(r.ids[-1] == tok.eos_token_id for r in rows) >= 18
            assert sum(len(r.ids) for r in rows) > 20 * 0.7 * width
        assert sum(bool(r.pictures) for r in rows) > 6 or not share
    for look, held_out in (("id", "ood"), ("ood", "id")):  # the look that the base learns poorly
        asked, args.visual, args.picture_share, args.batch = set(), look, 1, 1
        env = SimpleNamespace(picture_document=lambda *_, rare, pixels: asked.add(rare) or ("A", []))
        sft.pretraining_rows(args, env, tok, random.Random(0))
        equal(asked, {held_out}, f"the rare look, for a base of {look}")
    args = SimpleNamespace(stage="base", seed=0, batch=1, row_tokens=128, chat_share=0.1, picture_share=0)
    rows = [sft.batch_rows(args, GeneralPoints, tok, None, *at)[0].ids for at in ((0, 0), (0, 1), (1, 0))]
    equal(len({*map(str, rows)}), 3, "rows of two ranks, and of the next step")


@functools.lru_cache(maxsize=None)
def eight_rows(family, pictures=8):
    """Eight conversations of unequal lengths; LLaVA's first ones have pictures."""
    make = lambda family, i, verify: GeneralPoints(verify=verify, vl=family != "gp" and i < pictures)
    return [e.segments[0] for e in played(family, world=make)]


def three_updates(family, rows, machine, budget=250):
    """SFT's loss + PPO's -> losses and gradient norms, first gradient, last weights (on rank 0), model."""
    model, tok = copy.deepcopy(tiny(family)[0]), tiny(family)[1]
    torch.manual_seed(0)
    head, pad = torch.nn.Linear(model.config.get_text_config().hidden_size, 1), tok.pad_token_id
    for module in (model, head):
        sft.shard(module, machine, torch.float32)
    parameters, numbers, gradient = [*model.parameters(), *head.parameters()], [], None
    # eps: at 1e-8 it would divide rounding by rounding
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    n = ev.all_sum([sum(sum(r.action_mask) for r in rows)], machine)[0]
    for _ in range(3):
        optimizer.zero_grad()
        loss = 0.0
        for part, weight in sft.micro_batches(rows, budget, machine):
            logp, entropy, value = ev.score(model, part, pad, machine, 1.0, head)
            old, advantage = (torch.cat([torch.linspace(low, high, sum(r.action_mask)) for r in part])
                              for low, high in ((-3, -1), (-1, 2)))
            ppo = rl.policy_loss(logp, old, advantage, 0.2) - 0.1 * entropy
            ppo = ppo + rl.value_loss(value, 0 * old, advantage, 0.2)
            part_loss = weight * (ppo.sum() / n + sft.sft_loss(model, part, n, pad, machine))
            part_loss.backward()
            loss += part_loss.item()
        norm = sft.clip_and_step(parameters, [optimizer], scaler, "")
        if gradient is None:
            gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            gradient = sft.gathered(gradient, machine)
        numbers += [*ev.all_sum([loss], machine), norm]
    return numbers, gradient, sft.gathered(parameters, machine), model


def alike(updates, expected, where):
    for what, *both in zip(("losses and norms", "gradient", "weights"), updates, expected):
        a, b = (torch.cat([torch.as_tensor(t).detach().flatten() for t in x]) for x in both)
        near(a, b, 1e-5, f"{where}: {what}")


def two_tables(machine, model):
    """The table of a greedy model, and of a player who is right at the first or second attempt, or never."""
    args = parsed("--max_new_tokens 12 --temperature 0 --verify 2")
    greedy = ev.evaluate(model, tiny()[1], args, machine, 5)
    with acting(lambda env, seed: env.expert() if env.attempts == int(seed.split("/")[1]) % 3 else "{}"):
        return greedy, ev.evaluate(model, tiny()[1], args, machine, 5)


def on_a_rank(rank, path, work):
    """One of two gloo ranks: work(machine, which of eight rows, path). It has three rows, or five."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    tiny("gp"), tiny("llava")  # before there are ranks: save_pretrained() writes on rank 0 only
    torch.distributed.init_process_group("gloo", f"file://{path}/ranks", rank=rank, world_size=2)
    faulthandler.enable()  # says where a rank was that is aborted
    ev.script(lambda: work(cpu(), slice(0, 3) if rank == 0 else slice(3, 8), path))  # with a script's end


def two_ranks(machine, mine, path):
    """What two ranks do. Rank 0 has one micro-batch less than rank 1; rank 1 has no fifth episode to play."""
    rows = torch.load(f"{path}/rows.pt", weights_only=False)
    results = {family: three_updates(family, rows[family][mine], machine) for family in rows}
    llava, tok = results["llava"][-1], tiny("llava")[1]
    sft.save_checkpoint(path, llava, tok, machine, {"step": 1}, {})
    mixed = [ev.Segment([1], pictures={"pixel_values": 0} if machine.rank else {})]
    raises(SystemExit, "pictures must be in all", lambda: sft.micro_batches(mixed, 250, machine))
    tables = two_tables(machine, sft.shard(copy.deepcopy(tiny()[0]), machine, torch.float32))
    means = rl.all_mean({"b": 3.0 * machine.rank, "a": 1.0 + machine.rank}, machine)
    whitened = rl.whiten(torch.arange(8.0)[mine], machine)
    results = {family: x[:3] for family, x in results.items()}
    torch.save((results, tables, means, whitened), f"{path}/{machine.rank}.pt")


def test_two_ranks_and_micro_batches_are_one_batch():
    """In three updates; by FSDP2 also in the weights that transformers loads, in whiten(), in the table."""
    with folder() as path:
        torch.save({family: eight_rows(family) for family in ("gp", "llava")}, f"{path}/rows.pt")
        torch.multiprocessing.spawn(on_a_rank, (path, two_ranks), nprocs=2)
        ranks = [torch.load(f"{path}/{rank}.pt", weights_only=False) for rank in (0, 1)]
        loaded = hf.AutoModelForImageTextToText.from_pretrained(f"{path}/checkpoint-1")
    results, tables, means, whitened = zip(*ranks)
    for family in results[0]:
        rows = eight_rows(family)
        parts = [len(sft.micro_batches(mine, 250, cpu())) for mine in (rows[:3], rows[3:])]
        assert parts[0] < parts[1], (family, parts)
        *full, model = three_updates(family, rows, cpu(), 10 ** 9)
        equal(results[1][family][0], results[0][family][0], "numbers of ranks that step in unison")
        alike(results[0][family], full, f"{family}, two ranks")
    equal(type(loaded), type(model))
    equal(loaded.lm_head.weight.data_ptr(), loaded.get_input_embeddings().weight.data_ptr(), "tied")
    for name, x in model.state_dict().items():
        near(loaded.state_dict()[name], x, 1e-5, name)
    for family, pictures in (("gp", 0), ("llava", 3)):  # in one process some rows may have pictures
        rows = eight_rows(family, pictures)
        full, single = (three_updates(family, rows, cpu(), budget)[:3] for budget in (10 ** 9, 1))
        alike(single, full, f"{family}, a row at a time")
    equal(means, ({"b": 1.5, "a": 1.5},) * 2, "all_mean() of two ranks")
    near(torch.cat(whitened), rl.whiten(torch.arange(8.0), cpu()), 1e-5, "whiten()")
    expected = two_tables(cpu(), tiny()[0])
    assert 0.2 < expected[1]["id"]["p"] < 0.9
    equal(tables, (expected,) * 2, "tables, at T = 0 episode by episode")


def test_memory_flags_change_no_gradient():
    """Neither --micro_tokens does in the loops, nor --activation_checkpointing: it runs blocks twice."""
    with folder(init=True) as out:
        block = type(ev.load(f"{out}/gp/base")[0].model.layers[0].self_attn)
        for module, table in ((sft, sft.SFT), (rl, rl.PPO)):
            name, kept, runs = module.__name__, [], []

            def look(parameters, *_):  # takes no step
                kept.append(torch.cat([p.grad.flatten() for p in parameters]))
                return 0.0
            for i, (micro, again) in enumerate(((10 ** 6, None), (1, None), (300, None), (10 ** 6, True))):
                count = lambda *_, **__: runs.append((i, torch.is_grad_enabled()))
                with mock.patch.object(module, "clip_and_step", look), watching(block, "forward", count), \
                        mock.patch.dict(table, epochs=1, minibatches=1):
                    quick(module.main, flags(out, batch=6, name=f"{name}{i}", micro_tokens=micro,
                                             activation_checkpointing=again))
            full, one, some, again = (gradient / kept[0].abs().max() for gradient in kept)
            near(one, full, 1e-3, f"{name}: a row at a time")
            near(some, full, 1e-3, f"{name}: 300 tokens at a time")
            near(again, full, 1e-5, f"{name}: activations computed again")
            equal(runs.count((3, True)), 2 * runs.count((0, True)), f"{name}: runs of a block with gradient")


def small_model(name, **more):
    """A random tiny text model of a class of transformers, with the tiny tokenizer's vocabulary."""
    return hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(
        name, vocab_size=len(tiny()[1]), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, **more))


def test_activation_checkpointing_adds_no_noise():
    """Blocks run twice give the same scores and gradients, in families with dropout or noisy routers."""
    noisy = {"gpt2": dict(resid_pdrop=0.5, attn_pdrop=0.5), "gpt_neox": dict(hidden_dropout=0.5),
             "phi": dict(resid_pdrop=0.5), "opt": dict(dropout=0.5, layerdrop=0.5),
             "mixtral": dict(router_jitter_noise=0.5), "falcon": dict(hidden_dropout=0.5)}
    segments = [e.segments[0] for e in played(n=3)]
    for name, noise in noisy.items():
        torch.manual_seed(0)
        model = small_model(name, num_key_value_heads=2, ffn_dim=64, word_embed_proj_dim=32, **noise).eval()
        found = []
        for again in (False, True):
            if again:
                sft.recompute_activations(model)
            model.zero_grad()
            logp = ev.score(model, segments, 0, cpu())[0]
            logp.sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            found.append((logp.detach(), gradient))
        near(found[1][0], found[0][0], 1e-5, f"{name}: log-probs")
        near(found[1][1], found[0][1], 1e-4, f"{name}: gradients")
    model._no_split_modules = None
    raises(SystemExit, "does not name its blocks", lambda: sft.recompute_activations(model))


def test_resume_is_the_uninterrupted_run():
    """A run that a signal stopped, moved and resumed, has an uninterrupted run's weights, to the bit, and
    its records. Evaluations and saves are due at equal shares of the budget."""
    clocks = "tokens_per_s", "sampling_seconds", "episodes_per_s", "memory_gb"
    for module, place, tokens, pressed, extra in (
            (sft, "gp/id/sft", 1400, signal.SIGTERM, {}), (rl, "gp/id/rl", 6e3, signal.SIGTERM, {}),
            (sft, "gp-vl/base", 4e3, signal.SIGINT, {"stage": "base", "vl": True})):
        base = place == "gp-vl/base"
        with folder(init=True) as one, folder() as path:
            two, moved = f"{path}/two", f"{path}/moved"
            shutil.copytree(small_init(), two)
            line = lambda out: flags(out, None, tokens=tokens, evaluations=3, **extra)
            saved, logs = [], []
            with watching(module, "save_checkpoint", lambda *call: saved.append(call[5]["step"])):
                quick(module.main, line(one))
            [header, *_], steps = records(f"{one}/{place}"), records(f"{one}/{place}", "grad_norm")
            start = 0 if base else state_of(f"{one}/gp/id/init")["flops"]
            used = [(r["flops"] - start) / 6 / header["n"] / tokens for r in steps]  # after each step

            def due(n):
                return sorted({next(k for k, x in enumerate(used, 1) if x >= i / n) for i in range(1, n)})
            evaluated = [r["step"] for r in records(f"{one}/{place}", "seen")]
            equal(evaluated, [0] * (not base) + due(3) + [len(used)], f"{place}: evaluations")
            equal((saved, len(due(3))), (due(4) + [len(used)], 2), f"{place}: saves, evaluations on the way")

            def press(_, parameters, optimizers, scaler, where):
                if where.split()[1] == str(due(3)[0] - 1):
                    signal.raise_signal(pressed)
            with watching(module, "clip_and_step", press):
                equal(raises(SystemExit, "", lambda: quick(module.main, line(two))), "130", "exit code")
            equal(state_of(f"{two}/{place}")["step"], due(3)[0], "saved step")
            error_of("--resume", module.main, line(two))
            os.rename(two, moved)
            quick(module.main, f"--out {moved} --resume" + " --stage base --vl" * base)
            assert same(*(weights(f"{out}/{place}") for out in (one, moved))), f"{place}: other weights"
            for out in (one, moved):
                _, *log = records(f"{out}/{place}")
                logs.append([{k: x for k, x in r.items() if k not in clocks} for r in log])
            equal(logs[1], logs[0], f"{place}: records")


def test_signals():
    """One in the last save counts too. A second Ctrl-C stops at once. Then the handlers are the old ones."""
    before, told = (signal.default_int_handler, signal.getsignal(signal.SIGTERM)), []
    signal.signal(signal.SIGINT, before[0])  # a process in the background may begin with Ctrl-C ignored
    with folder(init=True) as out:
        for name, place, pressed, kind, words in (
                ("late", "save_checkpoint", signal.SIGTERM, SystemExit, "130"),
                ("twice", "clip_and_step", signal.SIGINT, KeyboardInterrupt, "")):
            with watching(sft, place, lambda *_: [signal.raise_signal(pressed) for _ in range(2)]), \
                    watching(sft, "print0", lambda _, machine, text: told.append(text)):
                raises(kind, words, lambda: quick(sft.main, flags(out, name=name)))
            after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
            equal(after, before, f"{name}: handlers afterwards")
        equal([text for text in told if text.startswith("stopped")], [
            f"stopped; go on with it: python sft.py --stage sft --env gp --rule id --out {out} --seed 3 "
            "--name late --resume"])
        equal(state_of(f"{out}/gp/id/late")["step"], 1, "what is saved")
        equal(ev.checkpoint_at(f"{out}/gp/id/twice"), None, "what is saved")
    equal(raises(SystemExit, "", lambda: ev.script(lambda: signal.raise_signal(signal.SIGINT))), "130")


def test_muon():
    """Two steps are torch.optim.Muon's, to the rounding of its bfloat16. Most singular values come near 1."""
    rng = torch.Generator().manual_seed(0)
    shapes = (128, 320), (320, 128), (128, 320), (64, 64), (16, 128)
    mine, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = [
        Muon([{"params": matrices[:2], "lr": 0.02}, {"params": matrices[2:], "lr": 0.1}], lr=0.02, **more)
        for Muon, matrices, more in ((sft.Muon, mine, {}), (torch.optim.Muon, theirs, {"weight_decay": 0}))]
    for step in range(2):
        before = [p.detach().clone() for p in mine + theirs]
        for p, q in zip(mine, theirs):
            p.grad = torch.randn(p.shape, generator=rng) * torch.rand(p.shape[1], generator=rng) ** 2
            q.grad = p.grad
        for optimizer in optimizers:
            optimizer.step()
        moves = [(new - old).detach() for new, old in zip(mine + theirs, before)]
        for i, (move, expected) in enumerate(zip(moves, moves[len(mine):])):
            what = f"step {step}, matrix {i}"
            lr = (0.02 if i < 2 else 0.1) * max(1, move.shape[0] / move.shape[1]) ** 0.5
            differs = ((move - expected).norm() / expected.norm()).item()
            within(0, differs, 0.025, f"{what}: share that differs from torch's")
            sizes = torch.linalg.svdvals(move / lr)
            share = ((sizes > 0.7) & (sizes < 1.2)).float().mean().item()
            within(0.7, share, 1, f"{what}: share of singular values near 1")


def test_learning_rates():
    """Muon has the matrices of blocks and projector; vision learns slower; warm-up and decay scale all."""
    models, seen = [], []

    def look(_, parameters, optimizers, *__):
        seen.append({p: (type(o).__name__, group["lr"])
                     for o in optimizers for group in o.param_groups for p in group["params"]})
    with folder() as out, watching(sft, "clip_and_step", look), \
            watching(sft, "sft_loss", lambda _, model, *__: models.append(model)):
        quick(sft.main, flags(out, 2, 2, stage="base", vl=True))
    for step, rates in enumerate(seen):
        equal(len(rates), len(list(models[0].parameters())), "parameters with a rate")
        for name, p in models[0].named_parameters():
            matrix = p.ndim == 2 and ("layers." in name or "projector" in name)
            share = 0.1 if "vision_tower" in name or "projector" in name else 1.0
            kind, rate = rates[p]
            equal(kind, "Muon" if matrix else "AdamW", name)
            expected = (0.01 if matrix else 3e-3) * share * (step + 1) / 50
            near(rate, expected, 1e-9, f"rate of {name} at step {step}")

    with folder(init=True) as out:
        for module, table, warmup, ratios in ((sft, sft.SFT, 3, {1.0}), (rl, rl.PPO, 1, {1.0, 10.0})):
            seen.clear()
            name = module.__name__
            with mock.patch.dict(table, decay=0.5, warmup=warmup, epochs=2), \
                    watching(module, "clip_and_step", look):
                quick(module.main, flags(out, None, tokens="5e3", lr="1e-5"))
            [first, *_], log = (records(f"{out}/gp/id/{name}", key) for key in ("seen", "grad_norm"))
            # left: of the budget, before each step
            left = [1 - (r["tokens"] - first["tokens"]) / 5e3 for r in [first, *log[:-1]]]
            assert len(log) > 4 and min(left) < 0.4
            factors = [min(1, (k + 1) / warmup) * min(1, x / 0.5) for k, x in enumerate(left)]
            near([r["lr"] for r in log], [1e-5 * factor for factor in factors], 1e-9, f"{name}: lr")
            shares = {round(rate / log[-1]["lr"], 6) for _, rate in seen[-1].values()}
            equal(shares, ratios, f"{name}: rates / lr")


def test_killed_save_leaves_a_whole_checkpoint():
    """Whichever operation on files fails or is a kill's last one, the newest checkpoint is whole, and the
    next save cleans up. A checkpoint is flushed before it gets its name."""
    (model, tok), changed, done = tiny(), sft.build_tiny("gp", seed=9)[0], []
    kinds = type(model), type(tok)
    watched = [(os, name) for name in ("mkdir", "unlink", "rmdir", "rename", "replace", "sync")]
    watched += [(torch, "save"), *((kind, "save_pretrained") for kind in kinds)]

    def files(path):
        return {os.path.basename(file): content for file, content in tree(path).items()}

    def save_as(out, step, model):
        sft.save_checkpoint(out, model, tok, cpu(), {"step": step}, {"moments": torch.ones(9)})
        return files(f"{out}/checkpoint-{step}")

    def step_left(last=None, error=None):
        """Save checkpoint 3 where 1 and the rest of 2 are, with an error in place of operation `last`."""
        def stopping(name, real):
            def operation(*arguments, **keywords):
                if name != "mkdir" or not os.path.isdir(arguments[0]):  # else it changes nothing
                    done.append(name)
                    if len(done) - 1 == last:
                        raise error
                if name == "sync":
                    assert files(f"{out}/checkpoint-3.part") == new, "not all is written when it is flushed"
                    return None
                return real(*arguments, **keywords)
            return operation
        with folder() as out:
            old = save_as(out, 1, model)
            put(f"{out}/checkpoint-2.part", "junk", b"of a save that was killed")
            os.mkdir(f"{out}/checkpoint-mine")  # someone's copy
            done.clear()
            with contextlib.ExitStack() as stack:
                for owner, name in watched:
                    operation = stopping(name, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, operation))
                try:
                    save_as(out, 3, changed)
                except KeyboardInterrupt:
                    pass
                except SystemExit as e:
                    assert f"{out}/checkpoint-3: {error}" in str(e), e
            path, where = ev.checkpoint_at(out), f"{error!r} at {done[-1]}"
            step = int(path.rpartition("-")[2])
            assert files(path) == {1: old, 3: new}[step], f"checkpoint {step} is not whole, {where}"
            following = 3 + (step == 3)
            save_as(out, following, model)
            left = [f"checkpoint-{following}", "checkpoint-mine"]
            equal(sorted(os.listdir(out)), left, f"what the next save leaves, {where}")
            return step
    with folder() as out:
        new = save_as(out, 3, changed)
    equal(step_left(), 3)
    operations = list(done)
    assert {"sync", "save", "replace", "mkdir"} < set(operations), operations
    assert operations.count("unlink") > 5, operations
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        for i, name in enumerate(operations):
            expected = 1 if i <= operations.index("rename") else 3
            equal(step_left(i, error), expected, f"checkpoint left by {error!r} at {name}, {i}")


class Toy:
    """One question; an answer that begins with a digit is right. Also the example of a third environment."""
    title, rule_names, reward_scale, default_verify = "Toy", {"id": "a", "ood": "b"}, 5.0, 1
    verdicts, demonstrators, pays = ("success", "wrong"), ("expert",), True
    document, fragments = map(staticmethod, (GeneralPoints.document, GeneralPoints.fragments))

    def __init__(self, rule="id", split="train", verify=1, seed=0, data=None):
        pass

    @staticmethod
    def columns(rule, visual):
        return {c: {} for c in ("seen", "id", "ood")}

    def reset(self, seed=None):
        return [{"role": "user", "content": "Cards: "}], []

    def step(self, text):
        right = text[:1].isdigit()
        info = dict(verdict="success" if right else "wrong", success=right, position_solved=right,
                    position_done=True, rule_matters=False, other_rule=False)
        return Step(None, [], (5.0 if right else 0.0) * self.pays, True, info)

    def expert(self, demonstrator="expert"):
        return "7"


def test_ppo_learns_a_toy_and_kl_pulls_back():
    """Success on a toy task goes up. Without reward and with beta > 0 the KL to the reference goes down."""
    with folder() as out, mock.patch.dict(ev.ENVS, toy=Toy), mock.patch.dict(rl.PPO, target_kl=1):
        save(f"{out}/start", *sft.build_tiny("toy", seed=0))
        path = f"{out}/toy/id/rl"
        quick(rl.main, flags(out, 25, 64, env="toy", init=f"{out}/start", lr=1e-3, beta=0, max_new_tokens=3))
        run = records(path, "reward")
        assert run[0]["success"] < 0.3 and run[-1]["success"] > 0.8, (run[0]["success"], run[-1]["success"])
        # V = 0 would leave a value loss of about 0.4
        assert abs(run[0]["explained_var"]) < 1e-3 and run[-1]["value_loss"] < 0.1, run[-1]
        args = ev.read_json(f"{path}/args.json")
        ev.write_json(f"{path}/args.json", {**args, "beta": 0.5})  # what no flag may do
        with mock.patch.object(Toy, "pays", False):
            quick(rl.main, f"--env toy --out {out} --resume --steps 50")
        run = records(path, "reward")
        assert run[-1]["kl3"] < run[25]["kl3"] / 2, (run[25]["kl3"], run[-1]["kl3"])


def test_a_third_environment():
    """One line in ENVS is enough for all stages and the table. With pictures its defaults are gp-vl's."""
    with folder() as out, mock.patch.dict(ev.ENVS, toy=Toy), tiny_stages():
        text = quick(rl.main, flags(out, env="toy"))
        for words in ("[base] toy", "[init] toy", "[rl] toy",
                      "Toy: trained on rule id (a), held out is rule ood (b)"):
            assert words in text, text
        [row] = records(f"{out}/toy/id/rl", "reward")  # a verdict may have a metric's name
        near(row["verdicts"]["success"], row["success"], 1e-9, "share of right answers, success")
        error_of("Toy has no pictures", sft.main, flags(out, env="toy", vl=True))

    class Twice(Toy):
        """Two positions with one prompt are two conversations."""
        def step(self, text):
            step, self.second = super().step(text), not getattr(self, "second", False)
            step.messages, step.done = (self.reset()[0], False) if self.second else (None, True)
            return step
    [episode] = ev.rollout(*tiny(), [Twice()], [0], 1.0, 4, cpu())
    prompts = [s.ids[:s.action_mask.index(1)] for s in episode.segments]
    equal(prompts, [ev.prompt(tiny()[1], Twice().reset()[0]).ids] * 2)

    class Appends(Toy):
        """One conversation of two answers, in a list that goes on growing."""
        def reset(self, seed=None):
            self.chat = super().reset()[0]
            return self.chat, []

        def step(self, text):
            step = super().step(text)
            self.chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "Again."}]
            step.done = step.info["position_done"] = len(self.chat) > 3
            step.messages = None if step.done else self.chat
            return step
    [episode] = ev.rollout(*tiny(), [Appends()], [0], 1.0, 4, cpu())
    equal((len(episode.turns), len(episode.segments)), (2, 1), "answers, conversations")
    states = sft.demonstrations(Appends(), 0)
    equal([len(messages) for messages, *_ in states], [1, 3], "messages before a demonstration")
    filled = SimpleNamespace(env="toy", vl=True)
    sft.fill_in(filled, sft.BASE)
    equal((filled.picture_share, filled.row_tokens), (0.5, 192), "share of pictures, width of a row")


def test_demonstrators():
    """Trained on are the expert's rows, or those of the habit."""
    with folder(init=True) as out, mock.patch.dict(ev.ENVS, toy=Toy):
        tok, written = ev.load(f"{out}/gp/id/init")[1], {}
        error_of("--demos habit: Toy has .* by expert", sft.main, flags(out, env="toy", demos="habit"))
        envs = [GeneralPoints(seed=3) for _ in range(6)]
        for i, env in enumerate(envs):
            env.reset(f"sft/3/0/0/{i}")
        for name in ("expert", "habit"):
            rows = []
            with watching(sft, "sft_loss", lambda _, model, part, *__: rows.extend(part)):
                quick(sft.main, flags(out, batch=6, demos=name, name=name))
            said = [[t for t, a in zip(r.ids, r.action_mask) if a] for r in rows]
            written[name] = sorted(tok.decode(ids[:-1]) for ids in said)
            equal(written[name], sorted(env.expert(name) for env in envs), f"demonstrations by {name}")
        assert written["expert"] != written["habit"]


def test_training_plays_its_own_split():
    """Both loops train by the flags' rule, look, attempts and temperature, and on the training split. Each
    step has episodes of its own, and so has each rank. PPO's numbers are those of its episodes."""
    def check(envs):
        met = {(env.rule, env.split, env.visual, env.verify, env.vl) for env in envs}
        equal(met, {("ood", "train", "ood", 2, True)}, "rule, split, look, attempts, pictures")
    rows, seeds, played, heats = [], [], [], set()

    def look(episodes, policy, tok, envs, its, temperature, *_):
        check(envs)
        heats.add(temperature)
        seeds.append(its)
        played.append(episodes)
    with folder() as out:
        save(f"{out}/m", *tiny("llava"))
        line = flags(out, 2, init=f"{out}/m", temperature=0.7, rule="ood", vl=True, visual="ood", pixels=80)
        with watching(sft, "batch_rows", lambda its, args, env, *_: (check([env]), rows.append(its))):
            quick(sft.main, line)
        more = " --gamma 0.6 --lam 0.8 --beta 0.3 --minibatches 1 --epochs 1"
        # Some answers are right, by their lengths.
        by_length = lambda said, *_, **__: judge_gp('{"formula": "1"}', [1], 1 + len(said) % 3)
        with watching(rl, "rollout", look), mock.patch.object(env_gp, "judge_gp", by_length), \
                watching(rl, "score", lambda _, model, part, pad, machine, heat, *__, **___: heats.add(heat)):
            quick(rl.main, line + more)
        log, tok = records(f"{out}/gp-vl/ood-ood/rl", "reward"), ev.load(f"{out}/m")[1]
        with open(f"{out}/gp-vl/ood-ood/rl/episodes.txt", encoding="utf-8") as f:
            written = f.read()
    equal(heats, {0.7}, "temperatures")
    equal([len({str(row.ids) for step in rows for row in step}), len({*seeds[0], *seeds[1]})], [8, 8],
          "demonstrations, and seeds of episodes, in two steps")
    assert tok.decode(played[0][0].segments[0].ids) in written, "an episode in episodes.txt"
    for record, episodes in zip(log, played, strict=True):
        turns, segments = ([x for e in episodes for x in getattr(e, name)] for name in ("turns", "segments"))
        positions = [turns for e in episodes for turns in e.positions()]
        k1, k3 = rl.kl_estimators(*(rl.joined(segments, name) for name in ("logp", "ref_logp")))
        values, returns = (rl.joined(segments, name) for name in ("value", "returns"))
        left = ((returns - values).var() / returns.var()).item()
        expected = {"reward": sum(t["reward"] for t in turns) / 4, "turns": len(turns) / 4,
                    "success": sum(e.turns[-1]["success"] for e in episodes) / 4,
                    "recognized": sum(p[0]["recognized"] for p in positions) / len(positions),
                    "tokens_per_answer": sum(t["tokens"] for t in turns) / len(turns),
                    "cut": sum(t["cut"] for t in turns) / len(turns), "explained_var": 1 - left,
                    "kl1": k1.mean().item(), "kl3": k3.mean().item()}
        for name, x in expected.items():
            near(record[name], x, 1e-5, name)
        equal(record["verdicts"], {v: sum(t["verdict"] == v for t in turns) / len(turns) for v in GP_REWARD})
        whitened = rl.joined(segments, "whitened")
        near([whitened.mean(), whitened.std(correction=0)], [0, 1], 1e-4, "whitened: mean, deviation")
        for e in episodes:
            before = [s.advantage.clone() for s in e.segments]
            rl.estimate_advantages(e, 5.0, 0.3, 0.6, 0.8)
            near(rl.joined(e.segments, "advantage"), torch.cat(before), 1e-6, "advantages")


def without_scoring_error():
    """Within, nobody asks before a run begins whether generate() and score() agree."""
    return mock.patch.object(ev, "scoring_error", lambda *_: 0)


def test_compute_is_the_papers_formula():
    """X = 6 N D_trained + 2 N D_buffer, counted by hand: every token, each time that a model reads it."""
    (model, tok), read, lengths = tiny(), [], []

    def count(self, input_ids, attention_mask, cache=None, **more):
        new = 0 if cache is None else cache.get_seq_length() + 1  # what an attempt before has read, or said
        out = generate(self, input_ids=input_ids, attention_mask=attention_mask, cache=cache, **more)
        ends = out.sequences[:, input_ids.shape[1]:] == tok.eos_token_id
        said = (ends.cumsum(1) - ends.long() == 0).sum()  # up to the first end, with it
        read.append((attention_mask[:, new:].sum() + said).item())
        return out
    generate = type(model).generate
    look = lambda episodes, *_: lengths.extend(len(s.ids) for e in episodes for s in e.segments)
    with folder(init=True) as out:
        start, n = state_of(f"{out}/gp/id/init")["flops"], sum(p.numel() for p in model.parameters())
        assert 0 < start < state_of(f"{out}/gp/base")["flops"], "the base's compute is not in an init's"
        with mock.patch.object(type(model), "generate", count), watching(rl, "rollout", look), \
                mock.patch.dict(rl.PPO, target_kl=1e9), without_scoring_error():  # which samples a few tokens
            quick(rl.main, flags(out, batch=8, epochs=3))
        [record] = records(f"{out}/gp/id/rl", "reward")
        expected = 6 * n * 3 * sum(lengths) + 2 * n * (sum(read) + 2 * sum(lengths))
        near(record["flops"] - start, expected, 1e-9, "PPO")
        quick(sft.main, flags(out))
        states = [sft.demonstrations(GeneralPoints(seed=3), f"sft/3/0/0/{i}")[0] for i in range(4)]
        trained = sum(len(sft.demonstration_row(tok, model, *state).ids) for state in states)
        [record] = records(f"{out}/gp/id/sft", "loss")
        near(record["flops"] - start, 6 * n * trained, 1e-9, "SFT")
        near(record["tokens"], record["flops"] / 6 / n, 1e-9, "tokens")


def test_matched_compute():
    """SFT and PPO have the same default budgets. A task gets its own column of a table; a flag wins."""
    for column, task in enumerate(sft.TASKS):
        for table in (sft.EVERY, sft.BASE, sft.SFT, sft.INIT, rl.PPO):
            args = SimpleNamespace(env=task.removesuffix("-vl"), vl=task.endswith("-vl"), batch=7)
            sft.fill_in(args, table)
            expected = {k: v[column] if isinstance(v, tuple) else v for k, v in table.items()} | {"batch": 7}
            equal({k: getattr(args, k) for k in expected}, expected, task)
            assert all(len(v) == 4 for v in table.values() if isinstance(v, tuple))
    equal(rl.PPO["tokens"], sft.SFT["tokens"], "PPO's budgets compared with SFT's")


def test_no_step_on_a_bad_gradient():
    """fp32 ends; with a loss scaler no optimizer steps. A good gradient is unscaled and clipped to norm 1."""
    for scaled, bad in itertools.product((False, True), (False, True)):
        parameters = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
        optimizers = [torch.optim.SGD([p], lr=1.0) for p in parameters]
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        scale = scaler.scale(torch.ones(1)).item()
        for p, grad in zip(parameters, (3.0, math.nan if bad else 4.0)):
            p.grad = torch.tensor([grad * scale])
        step = functools.partial(sft.clip_and_step, parameters, optimizers, scaler, "step 1")
        if bad and not scaled:
            raises(SystemExit, "gradient is not finite at step 1", step)
        else:
            norm = step()
            assert not math.isfinite(norm) if bad else abs(norm - 5) < 1e-4, norm
            equal(scaler.get_scale(), scale / 2 if bad else scale, "scale")
        expected = [0, 0] if bad else [-0.6, -0.8]
        near([p.item() for p in parameters], expected, 1e-5, f"scaled: {scaled}, bad: {bad}")


def test_mixed_precision_branches():
    """In bf16 and fp16 layers compute in that type, the value head in fp32; weights stay fp32."""
    def look(output, module, *_):
        part = "head" if module.out_features == 1 else "layer"
        types.add((torch.is_grad_enabled(), part, output.dtype))
    places = ("gp", "gp/id"), ("llava", "gp-vl/id-id")
    for (family, place), dtype in itertools.product(places, ("bf16", "fp16")):
        machine, kind = cpu(dtype), {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        scored = ev.score(tiny(family)[0], eight_rows(family)[:2], 0, machine)
        equal([x.dtype for x in scored[:2]], [torch.float32] * 2, "log-probs, entropies")
        with folder() as out:
            save(f"{out}/m", *tiny(family))
            before = weights(f"{out}/m")
            pictures = {"vl": True, "pixels": 80} if family == "llava" else {}
            expected = {"sft": {(True, "layer", kind)}}
            expected["rl"] = {(grad, *part) for grad in (True, False)
                              for part in (("layer", kind), ("head", torch.float32))}
            for main, name in ((sft.main, "sft"), (rl.main, "rl")):
                types = set()
                with watching(torch.nn.Linear, "forward", look), without_scoring_error():  # it is in fp32
                    quick(main, flags(out, init=f"{out}/m", dtype=dtype, **pictures))
                equal(types, expected[name], f"{family}, {dtype}, {name}")
                scaler = state_of(f"{out}/{place}/{name}")["scaler"]
                equal("scale" in scaler, dtype == "fp16", "a loss scaler, saved")
                after = weights(f"{out}/{place}/{name}")
                assert all(v.dtype == torch.float32 for v in after.values())
                changed = " ".join(k for k in after if not torch.equal(before[k], after[k]))
                equal("layers" in changed, True, changed)
                equal(("vision" in changed, "language" in changed), (bool(pictures),) * 2, changed)


def test_model_families():
    """--model takes any causal language model, with --vl any that sees; transformers loads what is saved."""
    for name in ("llama", "qwen2", "gpt2", "opt", "mllama", "idefics3"):
        vl = name in PICTURES
        if vl:
            model, tok = tiny(name)
        else:
            tok = sft.build_tiny("gp", 0)[1]
            tok.chat_template = None if name == "gpt2" else tok.chat_template
            narrower = {"word_embed_proj_dim": 16} if name == "opt" else {}  # its last hidden state
            model = small_model(name, num_key_value_heads=1, eos_token_id=tok.eos_token_id, **narrower)
            # As released: sampling defaults that must not leak into rollouts.
            model.generation_config.update(top_k=2, top_p=0.5, repetition_penalty=1.5, do_sample=True)
        with folder() as out:
            save(f"{out}/m", model, tok)
            loaded, tok = ev.load(f"{out}/m")
            assert type(loaded) is type(model)
            config = loaded.generation_config
            equal((config.top_k, config.top_p, config.repetition_penalty), (None,) * 3, "sampling defaults")
            saved = []
            with tiny_stages(), \
                    watching(rl, "save_checkpoint", lambda _, path, model, *__: saved.append(model)):
                text = quick(rl.main, flags(out, model=f"{out}/m") + " --vl --pixels 40" * vl)
            assert ("no chat template" in text) == (name == "gpt2")
            place = f"{out}/gp-vl/id-id" if vl else f"{out}/gp/id"
            start, init, trained = loaded.state_dict(), weights(f"{place}/init"), weights(f"{place}/rl")
            assert not same(start, init) and not same(init, trained), f"{name}: weights that did not move"
            [row] = records(f"{place}/rl", "reward")
            assert all(math.isfinite(x) for x in row.values() if isinstance(x, float)), row
            equal(row["updates"], 8 if vl else 16, "updates")
            plain = type(model).from_pretrained(ev.checkpoint_at(f"{place}/rl"), dtype=torch.float32)
            inputs, _ = ev.collate([ev.prompt(tok, *world(name, 0, 1).reset(0))], 0, "cpu")
            assert torch.equal(*(m.eval()(**inputs).logits for m in (plain, saved[-1]))), name
            if vl:
                sides = []
                with watching(ev, "table", lambda _, paths, args, machine: sides.append(args.pixels)):
                    quick(ev.main, f"--out {out} --vl --episodes 1")
                equal(sides, [40], "eval.py's --pixels, from the run's args.json")
                error_of("trained on pictures with --pixels 40, not 50", ev.main,
                         f"--out {out} --vl --pixels 50")


# Chat templates with the traits of released ones. Roles are written out: the tiny tokenizer has <|user|>.
LLAMA = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}<|system|>Today: {{ date_string }}{{ strftime_now('%d %b') }}<|eot|>{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
QWEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}")
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant, and there is no system role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }} <|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
GPT_OSS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if '<|channel|>' in m.content or not m.content %}{{ raise_exception('no such answer') }}{% endif %}"
    "<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}")
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>{{ '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")
R1 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|eot|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")
SMOLVLM = (
    "{% for m in messages %}{{ m.role + ':' }}{% for part in m.content %}{{ ' ' + part.text }}{% endfor %}"
    "<|eot|>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
NEWLINE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% else %}{{ eos_token }}{% endif %}")
ZEPHYR = ("{% for m in messages %}{{ m.role + ':\n' + m.content }}<|eot|>\n{% endfor %}"
          "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}")
MARKS = ("<|eot|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>")


def with_template(template, adds_bos=False):
    """load() of a tiny model that has this chat template -> the model, its tokenizer, what was printed."""
    model, tok = sft.build_tiny("gp", 0)
    tok.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(MARKS)})
    model.resize_token_embeddings(len(tok))
    if adds_bos:
        bos = [("<s>", tok.convert_tokens_to_ids("<s>"))]
        tok.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    tok.chat_template = template
    with folder() as out, contextlib.redirect_stdout(io.StringIO()) as said:
        save(f"{out}/m", model, tok)
        return *ev.load(f"{out}/m"), said.getvalue()


def test_templates():
    """prompt + demonstration + glue is what the template renders, whatever was said and on whatever day."""
    for name, template, adds_bos, end, line in (
            ("llama", LLAMA, True, "<|eot|>", ""), ("qwen", QWEN, False, "<|eot|>", ""),
            ("gemma", GEMMA, True, "<|eot|>", ""), ("gpt-oss", GPT_OSS, False, "<|return|>", ""),
            ("glm", GLM, False, "<|user|>", ""), ("r1", R1, False, "<|eot|>", "thinking is not off"),
            ("smolvlm", SMOLVLM, False, "<|eot|>", ""), ("newline", NEWLINE, False, "<|end|>", ""),
            ("base", None, True, "<|end|>", "no chat template")):
        model, tok, text = with_template(template, adds_bos)
        assert line in text and bool(line) == bool(text), (name, text)
        ids, env, prompts = tok.convert_tokens_to_ids, GeneralPoints(verify=3), []
        ends = sorted({ids("<|end|>"), ids(end)})
        equal(model.generation_config.eos_token_id, ends, f"{name}: ends of a turn")
        for day in (1, 2):
            with mock.patch("transformers.utils.chat_template_utils.datetime") as clock:
                clock.now.return_value.strftime.side_effect = lambda form: f"day {day}"
                messages, _ = env.reset(0)
                prompts.append(ev.prompt(tok, messages).ids)
        equal(prompts[1], prompts[0], f"{name}: tomorrow's prompt")
        begins = [i for i, token in enumerate(prompts[0]) if token == ids("<s>")]
        equal(begins, [0] * adds_bos, f"{name}: places of BOS")
        assert ("<think></think>" in tok.decode(prompts[0])) == (name == "qwen"), tok.decode(prompts[0])
        assert messages[0]["content"] in tok.decode(prompts[0]), f"{name}: the prompt lacks the task"
        answer, step = ev.answer_ids(tok, model, "hello"), env.step("hello")
        equal(answer[-1], ids(end), f"{name}: the end of a demonstration's turn")
        whole, glue = ev.prompt(tok, step.messages).ids, ev.glue_ids(tok, step.messages, answer[-1])
        if name not in ("qwen", "r1"):  # which leave the thinking out of what was said before
            # gpt-oss's "return" only ends the last turn, and "newline" ends only the whole conversation
            ended = answer[:-1] + [ids("<|eot|>")] if name == "gpt-oss" else answer
            if name != "newline":
                equal(tok.decode(prompts[0] + ended + glue), tok.decode(whole), f"{name}: in three turns")
            cut = answer[:-2] if name in ("gemma", "newline") else answer[:-1]  # a blank before the end
            equal(prompts[0] + cut + ev.glue_ids(tok, step.messages), whole, f"{name}: an answer cut off")
        for said in ("", "<|channel|>final", "</think> x", ev.MARK):  # some templates would refuse these
            step.messages[1]["content"] = said
            equal(ev.glue_ids(tok, step.messages, answer[-1]), glue, f"{name}: glue behind {said!r}")
        if name == "llama":  # a template that asks for the date, and templates by name: the default one
            tok.chat_template = "{{ date_string }}{{ messages[0].content }}"
            equal(ev.chat_text(tok, messages), ev.TODAY + messages[0]["content"], "the date")
            tok.chat_template = {"default": template, "tool_use": "nothing"}
            with folder() as out:
                save(f"{out}/m", model, tok)
                equal(ev.prompt(ev.load(f"{out}/m")[1], messages).ids, prompts[0], "by the default template")
    for template, text in ((GPT_OSS, "hello<|return|>"), (SMOLVLM, " hello<|eot|>")):
        model, tok, _ = with_template(template)
        equal(tok.decode(ev.answer_ids(tok, model, "hello")), text, "behind the header; with a blank")
    model, tok, _ = with_template(ZEPHYR)
    # As Llama 2's: a blank before a text.
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    ev.turn_form.cache_clear()  # load() has asked the tokenizer as it was
    said = ev.prompt(tok, messages).ids + ev.answer_ids(tok, model, "hello")
    text = ev.chat_text(tok, [*messages, {"role": "assistant", "content": "hello"}])
    equal(said, ev.encode(tok, text, ()).ids[:len(said)], "a prompt and a demonstration")
    header = GLM.replace("'\n'", "('\n' if m.role == 'user' else 'x')")
    for words, damaged in (("no such answer", GPT_OSS.replace("'<|channel|>' in m.content", "true")),
                           ("leaves out", QWEN.replace("m.content.split('</think>')[-1]", "''")),
                           ("begins an answer", header.replace("<|assistant|>{% e", "<|assistant|>y{% e"))):
        assert "\n" not in raises(SystemExit, words, lambda: with_template(damaged))


def test_ids_that_the_model_lacks():
    """Padding without an embedding is replaced; an end that pads learns; a mark without one is an error."""
    model, tok = sft.build_tiny("gp", 0)
    segments = [e.segments[0] for e in played()]
    before = ev.score(model, segments, tok.pad_token_id, cpu())[0]
    tok.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|eot|>"]})
    with folder() as out:
        def loaded():
            save(f"{out}/m", model, tok)
            return ev.load(f"{out}/m")
        its_model, its = loaded()
        equal(its.pad_token_id, its.eos_token_id, "the padding id")
        near(ev.score(its_model, segments, its.pad_token_id, cpu())[0], before, 1e-6, "log-probs")
        model.config.pad_token_id = tok.eos_token_id
        embedding = loaded()[0].get_input_embeddings()
        embedding(torch.tensor([tok.eos_token_id])).sum().backward()
        gradient = embedding.weight.grad[tok.eos_token_id].tolist()
        equal(gradient, [1.0] * 128, "the gradient of an end token that also pads")
        model.generation_config.eos_token_id = [0, -1]  # 0 is an id like any other; -1 stands for none
        equal(loaded()[0].generation_config.eos_token_id, [0, its.eos_token_id], "ends of a turn")
        tok.chat_template = QWEN
        raises(SystemExit, "no embedding for '<|eot|>'", loaded)
        put(f"{out}/g", "model.gguf", b"GGUF")
        raises(SystemExit, "holds a GGUF", lambda: ev.load(f"{out}/g"))


def test_conversations_that_outgrow_the_context():
    """The episode ends there, as cut off, with its reward so far; a prompt and a demonstration must fit."""
    model, tok = tiny("gp")
    free = played(n=8)

    def context(tokens):
        return mock.patch.object(model.config, "max_position_embeddings", tokens)
    limit = 16 + max(len(e.segments[0].ids) for e in free) // 2
    with context(limit):
        short = played(n=8)
    assert any(len(a.turns) < len(b.turns) for a, b in zip(short, free)), "all conversations fit"
    for a, b in zip(short, free):
        [s], [whole], whole_rewards = a.segments, b.segments, [t["reward"] for t in b.turns]
        equal((s.ids, s.action_mask[-1]), (whole.ids[:len(s.ids)], 1), "the ids")
        within(1, len(s.ids), limit, "tokens of a conversation")
        equal([t["reward"] for t in a.turns], whole_rewards[:len(a.turns)], "rewards")
        equal(len(a.positions()), 1, "positions")
        if len(a.turns) < len(b.turns):
            assert a.turns[-1]["cut"] and not a.turns[-1]["success"], a.turns
        else:
            equal(a.turns[-1]["cut"], b.turns[-1]["cut"], "the end of one that fits")
    # What is needed is counted in tokens, without the holes that the cache has.
    needed = 16 + max(len(e.segments[0].ids) - e.turns[-1]["tokens"] for e in free)
    for tokens, fits in ((needed, True), (needed - 1, False)):
        with context(tokens):
            again = [e.segments[0].ids for e in played(n=8)]
        equal(again == [e.segments[0].ids for e in free], fits, f"all fit into {tokens}")
    with context(len(ev.prompt(tok, GeneralPoints().reset(0)[0]).ids) + 15):
        raises(SystemExit, "too short", lambda: played(n=3))
    with folder() as out:
        model, tok = copy.deepcopy(tiny("gp"))
        model.config.max_position_embeddings = 64
        save(f"{out}/m", model, tok)
        text = quiet(rl.main, flags(out, 2, init=f"{out}/m"))
        assert f" --init {out}/m --tokens 1e+09    # at the same" in text, f"next: {text}"
        equal([r["updates"] for r in records(f"{out}/gp/id/rl", "reward")], [16, 16], "updates")
        model.config.max_position_embeddings = 46  # the prompt's 21, and 24 of an answer
        save(f"{out}/short", model, tok)
        error_of("context of 46 tokens is too short: a demonstration has", sft.main,
                 flags(out, init=f"{out}/short"))


def test_sampled_is_scored_is_asked():
    """One line refuses a model that sees padding or what comes later, and one whose forward pass is noise. A
    run that is refused leaves no folder."""
    for family in FAMILIES:
        error = ev.scoring_error(*tiny(family), world(family, 0, 3), cpu("bf16"))
        within(0, error, 1e-4, f"{family}: error in fp32")
    with folder() as path:  # as some are released: with settings that only pretraining or old code needs
        model, tok = small_model("mixtral", num_key_value_heads=2, output_router_logits=True), tiny()[1]
        save(f"{path}/m", model, tok)
        put(f"{path}/m", "config.json", json.dumps(
            {**model.config.to_dict(), "output_attentions": True, "return_dict": False}).encode())
        model, tok = ev.load(f"{path}/m")
        within(0, ev.scoring_error(model, tok, world("gp", 0, 3), cpu()), 1e-4, "experts: error in fp32")
        save(f"{path}/again", model, tok)  # transformers refuses output_attentions
    kind, norm = type(tiny("gp")[0]), type(tiny("gp")[0].model.norm)
    real, still = kind.forward, norm.forward

    def sees_padding(self, input_ids=None, attention_mask=None, **more):
        return real(self, input_ids=input_ids, attention_mask=torch.ones_like(attention_mask), **more)

    def noise(self, x):  # in every layer
        return torch.nn.functional.dropout(still(self, x), 0.1)
    with folder(init=True) as out:
        save(f"{out}/m", small_model("bert", initializer_range=0.2), tiny()[1])
        error_of("what comes later", ev.main, f"--out {out} --models {out}/m")
        for main in (sft.main, rl.main):
            error_of("what comes later", main, flags(out, name="new", init=f"{out}/m"))
            error_of("context of 1024 tokens", main, flags(out, name="new", max_new_tokens=1024))
        for dtype in ("fp32", "bf16"):
            with mock.patch.object(kind, "forward", sees_padding):
                for main in (sft.main, rl.main):
                    error_of(r"differs by \S+: the model sees", main, flags(out, name="new", dtype=dtype))
            assert not os.path.exists(f"{out}/gp/id/new"), "a folder of a run that was refused"
            with mock.patch.object(norm, "forward", noise), without_scoring_error():
                error_of(r"\|log ratio\| before the first step", rl.main, flags(out, name=dtype, dtype=dtype))


def test_defaults_of_a_model_from_elsewhere():
    """A model that does not come from the tiny base has its own rates, budget and lengths; flags win."""
    def filled(main, line):
        """The flags and hyper-parameters of a run that does not begin."""
        taken, module = [], sys.modules[main.__module__]
        with mock.patch.object(module, "command", lambda args, train: taken.append(vars(args))):
            main(f"{line} --out {out}".split())
        return {k: taken[0][k] for k in (*sft.REAL, "value_rate", "pixels") if k in taken[0]}
    with folder() as out:
        save(f"{out}/m", *tiny())
        save(f"{out}/sees", *tiny(), from_elsewhere=False, pixels=48)
        real = {"tokens": 1e7, "batch": 64, "lr": 1e-5, "micro_tokens": 4096, "max_new_tokens": 256,
                "pixels": None}
        own = {"tokens": 7e5, "batch": 128, "lr": 2e-4, "micro_tokens": 2048, "max_new_tokens": 32,
               "pixels": None}
        with mock.patch.dict(sft.REAL_INIT, tokens=2e3):
            text = quick(rl.main, flags(out, model=f"{out}/m"))
        for lr in ("2e-05", "1e-05"):
            equal(text.count(f"a model of yours, so with --lr {lr} --tokens"), 1, text)
        header, expected = records(f"{out}/gp/id/init")[0], {"lr": 2e-5, "tokens": 2e3, "max_new_tokens": 24}
        equal({k: header[k] for k in real}, {**real, **expected}, "the init that rl.py made")
        shutil.copytree(ev.checkpoint_at(f"{out}/gp/id/rl"), f"{out}/copy")  # without its run's args.json
        init, ppo, sees = f"{small_init()}/gp/id/init", {**real, "value_rate": 10}, {**own, "tokens": 8e5}
        routes = {**own, "tokens": 6e5, "batch": 32, "lr": 5e-5, "max_new_tokens": 256, "value_rate": 100}
        for main, line, expected in (
                (sft.main, f"--stage init --model {out}/m --name b", {**real, "lr": 2e-5, "tokens": 1e6}),
                (rl.main, f"--name b --model {out}/m", ppo),
                (rl.main, f"--name b --model {out}/m --env virl --vl", {**ppo, "pixels": 1200}),
                (rl.main, f"--name b --init {out}/gp/id/init", ppo),  # it knows where it comes from
                (sft.main, f"--init {out}/copy", real),
                (sft.main, f"--init {out}/m --lr 0.5", {**real, "lr": 0.5}),
                (sft.main, f"--init {init}", own), (sft.main, f"--init {init} --vl", {**sees, "pixels": 80}),
                (sft.main, f"--init {out}/sees --vl", {**sees, "pixels": 48}),
                (sft.main, f"--model {out}/sees --vl", {**sees, "pixels": 48}),
                (rl.main, "--env virl --data x", routes)):
            equal(filled(main, line), expected, line)
        for start in ("--init", "--model"):
            error_of("sees was trained on pictures with --pixels 48, not 80", sft.main,
                     f"{start} {out}/sees --vl --pixels 80 --out {out}")


def test_memory():
    """Only scored positions get logits, no graph is unused, frozen models are in the compute type."""
    model, tok = tiny()
    segments = [s for e in played(n=3) for s in e.segments]
    rows = []
    with watching(model.lm_head, "forward", lambda logits, _: rows.append(logits.shape[:-1].numel())):
        expected = ev.score(model, segments, 0, cpu())
        sft.sft_loss(model, segments, 1, 0, cpu())
    equal(rows, [sum(sum(s.action_mask) for s in segments)] * 2, "positions that got logits")
    cannot_choose = SimpleNamespace(signature=lambda _: SimpleNamespace(parameters=()))
    with mock.patch.object(ev, "inspect", cannot_choose):
        for a, b in zip(ev.score(model, segments, 0, cpu())[:2], expected):
            near(a, b, 1e-5, "scores of a model whose forward() cannot choose, by all logits")
    entropies = [ev.score(model, segments, 0, cpu(), entropy_grad=grad)[1] for grad in (True, False)]
    equal([e.requires_grad for e in entropies], [True, False], "entropy has a graph")

    kinds, held, mapped, models = set(), [], [], []

    def look(_, model, *more, entropy_grad=True):
        kinds.add((next(model.parameters()).dtype, torch.is_grad_enabled(), entropy_grad))

    def bytes_of(tensors):
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def hold(norm, parameters, optimizers, *_):
        moments = [t for o in optimizers for s in o.state.values() for t in s.values() if t.ndim]
        held.append(bytes_of([*parameters, *(p.grad for p in parameters), *moments]))
        if os.path.exists("/proc/self/maps"):  # Linux
            with open("/proc/self/maps") as f:
                mapped.append("optimizer.pt" in f.read())
    with folder(init=True) as out:
        n = sum(p.numel() for p in ev.load(f"{out}/gp/base")[0].parameters())
        with watching(rl, "score", look), watching(rl, "clip_and_step", hold), \
                watching(sft, "clip_and_step", hold):
            for main in (rl.main, sft.main):
                quick(main, flags(out, dtype="bf16"))
                quick(main, flags(out, 2, dtype="bf16", resume=True))
        # score(): the weights' type, has it a graph, would the entropy, whose coefficient is 0, have one
        policy = {(torch.float32, False, True), (torch.float32, True, False)}
        equal(kinds, policy | {(torch.bfloat16, False, True)}, "types of policy and reference, graphs")
        assert not any(mapped), "a resumed run's optimizer.pt stays mapped, and so on the disk"
        head = 16 * (tiny()[0].config.hidden_size + 1)
        reference = bytes_of(ev.load(f"{out}/gp/id/init", dtype=torch.bfloat16)[0].parameters())
        state_bytes = runpy.run_path(os.path.join(HERE, "results", "figures.py"))["state_bytes"]
        equal(held[0] - head + reference, state_bytes(n, ppo=True)[0], "bytes that PPO holds")
        equal(held[-1], state_bytes(n, ppo=False)[0], "bytes that SFT holds")
        with watching(ev, "load", lambda loaded, *_: models.append(next(loaded[0].parameters()).dtype)):
            quick(ev.main, f"--out {out} --dtype bf16 --episodes 2")
        equal(set(models), {torch.bfloat16}, "evaluated models")


def test_a_run_is_a_folder():
    """One command makes it, and only --resume goes on with it, by its flags. A refusal changes no file."""
    with folder(init=True) as out:
        run = flags(out, 2, name="a")
        quick(sft.main, run)
        quick(rl.main, flags(out, name="r"))
        path, kept = f"{out}/gp/id/a", tree(out)
        args_json = ev.read_json(f"{path}/args.json")
        with mock.patch.object(sft, "load_model", side_effect=AssertionError("a model is loaded first")):
            error_of(f"{path} exists: go on with it by --resume, or choose another", sft.main, run)
        error_of("gp/id/none/args.json is missing", sft.main, flags(out, name="none", resume=True))
        for words, main, line in (
                ("a was made with --lr 0.0002, not 0.5", sft.main, f"{run} --lr 0.5"),
                ("a was made with --batch 4, not 5", sft.main, f"{run} --batch 5"),
                ("a was made with --seed 3, not 4", sft.main, f"{run} --seed 4"),
                ("a was made with --model None, not x", sft.main, f"{run} --model x"),
                ("a was made with --activation_checkpointing False, not True", sft.main,
                 f"{run} --activation_checkpointing"),
                (f"a was made with --init {out}/gp/id/init, not x", sft.main, f"{run} --init x"),
                ("r was made with --beta 0.02, not 1.0", rl.main, flags(out, name="r", beta=1)),
                ("r was made by stage rl, not sft", sft.main, flags(out, name="r")),
                ("a was made by stage sft, not rl", rl.main, run)):
            error_of(words, main, f"{line} --resume")
        equal(tree(out), kept, "files")
        damaged = json.dumps({k: v for k, v in args_json.items() if k != "warmup"}).encode()
        for words, content in (("missing or damaged", b"junk\xff"), ("made by stage None", b"[]"),
                               ("missing or damaged", b"7"), ("missing or damaged", b""),
                               ("damaged: it has no warmup", damaged)):
            put(path, "args.json", content)
            error_of(words, sft.main, f"{run} --resume")
        ev.write_json(f"{path}/args.json", args_json)
        equal(tree(out), kept, "files, with args.json as it was")

        # Another command makes the folder while this one loads its model.
        def meanwhile(*_):
            if not calls:
                calls.append(1)
                quick(sft.main, flags(out, name="both"))
                both.update(tree(f"{out}/gp/id/both"))
        calls, both = [], {}
        with watching(sft, "load_model", meanwhile):
            error_of("both exists: go on with it by --resume", sft.main, flags(out, name="both"))
        equal((tree(f"{out}/gp/id/both"), len(both) > 5), (both, True), "files of the first of two commands")

        # --resume alone has all flags. --tokens may grow; without --steps a run goes to its budget.
        def goes_on(more):
            quick(sft.main, f"--out {out} --name a/ --init {out}/gp/id/init/ --resume {more}")  # DIR/ is DIR
            return [r["step"] for r in records(path, "loss")]
        equal((goes_on("--tokens 1"), state_of(path)["done"]), ([1, 2], True), "steps, a budget used up")
        steps = goes_on("--tokens 1e3")
        assert len(steps) > 2 and state_of(path)["done"], steps
        equal(steps, list(range(1, len(steps) + 1)), "steps")
        equal(goes_on(""), steps, "steps of a finished run that was resumed")
        more = goes_on("--tokens 2e3")
        assert len(more) > len(steps) and more[:len(steps)] == steps, more
        changed = {k: v for k, v in ev.read_json(f"{path}/args.json").items() if args_json[k] != v}
        equal(changed, {"tokens": 2e3, "steps": None, "resume": True}, "flags that changed")

        # Moved to where --out is without the flag: its earlier stages are found, or made, below that place.
        for init, found in (("elsewhere/gp/id/init", None), ("elsewhere/gp/base", f"{out}/gp/base"),
                            ("m/gp/base", "m/gp/base"), (None, None)):
            ev.write_json(f"{path}/args.json", {**args_json, "out": "elsewhere", "init": init})
            look = lambda args, train: equal((args.out, args.folder, args.init), (out, path, found), "places")
            with watching(sft, "new_parser", lambda parser, *_: parser.set_defaults(out=out)), \
                    mock.patch.object(sft, "command", look):
                sft.main(["--name", "a", "--resume"])


def test_earlier_stages():
    """A missing one is made by the command that is printed. An unfinished or another one is left as it is."""
    with folder() as out, folder() as other, tiny_stages():
        text = quick(rl.main, flags(out, device="cpu", rule="ood"))
        made = re.findall(r"^\[(.*)\] needs (.*), so first: python sft.py (.*)$", text, re.M)
        equal([m[:2] for m in made], [("rl", f"{out}/gp/ood/init"), ("init", f"{out}/gp/base")], text)
        equal(text.count("success in %"), 1, f"tables, of PPO only: {text}")
        for _, path, line in reversed(made):  # what was printed, elsewhere
            copied = path.replace(out, other)
            assert "success in %" not in quick(sft.main, line.replace(out, other)), "a table, by --episodes 0"
            assert same(weights(path), weights(copied)), path
            a, b = (ev.read_json(f"{place}/args.json") for place in (path, copied))
            equal({k for k in a if a[k] != b[k]} - {"out", "folder", "init"}, set(), f"flags of {path}")

    with folder() as out, tiny_stages():
        def finish(stage, name):
            """Where a stage is not finished, PPO names the command that finishes it, and changes no file."""
            kept, start = tree(out), flags(out, rule="ood", seed=0, name=name)
            line = raises(SystemExit, f"{stage} is not finished", lambda: quick(rl.main, start))
            equal(tree(out), kept, "files")
            quick(sft.main, line.rpartition("python sft.py ")[2])
            return start
        # a base that was cut short, under another rule and other flags
        quick(sft.main, f"--stage base --out {out} --steps 1 --tokens 1.5e3 --episodes 2")
        start = finish("gp/base", "rl")
        assert state_of(f"{out}/gp/base")["done"]
        assert "[rl]" in quick(rl.main, start)
        os.rename(f"{out}/gp/ood/init", f"{out}/finished")  # an init that was killed before its first save
        os.mkdir(f"{out}/gp/ood/init")
        shutil.copy(f"{out}/finished/args.json", f"{out}/gp/ood/init")
        finish("gp/ood/init", "b")
        assert same(weights(f"{out}/gp/ood/init"), weights(f"{out}/finished")), "an init, from the beginning"

    with folder(init=True) as out:
        made = dict(seed=3, model=None, pixels=None, data=None, stage="init")
        save(f"{out}/gp-vl/base", *tiny("llava"), **made | {"pixels": 40})
        save(f"{out}/virl/id/init", *tiny("virl"), **made | {"data": "routes"})
        save(f"{out}/virl/ood/init", *tiny("virl"), **made | {"model": "their/model"})
        save(f"{out}/plain/gp/id/init", *tiny())
        kept = tree(out)
        for words, line in (
                ("init was made with --seed 3, not 4", flags(out, seed=4)),
                ("base was made with --pixels 40, not 80", flags(out, vl=True)),
                ("init was made with --data routes, not None", flags(out, env="virl")),
                ("init was made with --model their/model, not None", flags(out, env="virl", rule="ood")),
                ("init/args.json is missing", flags(f"{out}/plain"))):
            error_of(words, rl.main, line)
        equal(tree(out), kept, "files")


def test_help_explains_every_flag():
    """With its default: the one that a run gets."""
    for module, table in ((ev, {}), (sft, {**sft.EVERY, **sft.SFT}), (rl, {**sft.EVERY, **rl.PPO})):
        parsers, caller, explained = [], ev if module is ev else sft, 0
        with watching(caller, "new_parser", lambda parser, *_: parsers.append(parser)):
            leave = lambda: equal(raises(SystemExit, "", lambda: module.main(["--help"])), "0", "exit code")
            text = printed(leave)
        text = "".join(text.split())  # argparse breaks lines at hyphens too
        assert "".join(module.__doc__.split()) in text, "the docstring"
        for action in parsers[0]._actions:
            shown, flag = "".join((action.help % vars(action)).split()), f"{module.__name__} {action.dest}"
            assert shown and shown in text, flag
            default = table.get(action.dest) if action.default is None else action.default
            if default not in (None, "auto", "==SUPPRESS==") and default is not False:
                first = default[0] if isinstance(default, tuple) else default
                first = first if isinstance(first, str) else f"{first:g}"
                assert re.search(rf"default: (gp )?{re.escape(first)}[,)]", action.help), f"{flag}, {first}"
                explained += 1
        assert explained >= (5 if module is ev else 12), explained
    equal([parsed(f"--env {env}").episodes for env in ("gp", "virl")], [300, 200], "hands, routes")


def test_torchrun():
    """No base and no fp16 by torchrun: one line from each rank. Where one of two ranks fails, all end."""
    with folder(init=True) as out:
        put(out, "script.py", b"""if True:
            import os, sys, eval, rl
            for more in (["--out", "nothing"], ["--dtype", "fp16"]):
                try:
                    rl.main([*sys.argv[1:], *more])
                except SystemExit as e:
                    print(f"rank {os.environ['RANK']}: {e}\\n", end="", flush=True)  # in one piece
            if os.environ["RANK"] == "1":
                rl.estimate_advantages = lambda *_: eval.fail("rank 1 has had enough")
            eval.script(rl.main)""")
        launch = f"-m torch.distributed.run --standalone --nproc_per_node=2 {out}/script.py {flags(out, 2)}"
        text = command(*launch.split(), OMP_NUM_THREADS="1", PYTHONPATH=HERE, code=1)
        for line in ("error: the tiny base is pretrained by one process, not by torchrun: python sft.py "
                     "--stage base --env gp --rule id --out nothing --seed 3",
                     "error: torchrun works only with bf16 or fp32"):
            said = [text.count(f"rank {rank}: {line}") for rank in (0, 1)]
            equal(said, [1, 1], f"{line}\n{text[-2000:]}")
        assert "error: rank 1 has had enough" in text and "x 2 in float32" in text, text[-2000:]
        assert not os.path.exists(os.path.join(HERE, "nothing"))


def two_rank_flags(module, path, steps, batch, **more):
    more.update({"minibatches": 1} if module is rl else {})
    return flags(f"{path}/out", steps, batch, env="virl", micro_tokens=300, max_new_tokens=8, **more)


def torchrun_work(machine, mine, path):
    """What two ranks do: load in turn; train, in bf16 too; stop and resume. Rank 1 has no table's episode."""
    real_load, real_shard, refs, models, before, told = sft.load, sft.shard, [], [], [], []
    lock = f"{path}/loading"
    gc.disable()  # sharded models refer to themselves

    def gone(refs, what):
        equal([ref() for ref in refs if ref() is not None], [], f"{what} that stay in memory")

    def load(*arguments, **keywords):
        os.mkdir(lock)  # an error if the other rank is here
        model, tok = real_load(*arguments, **keywords)
        refs.extend(weakref.ref(p) for p in model.parameters())
        time.sleep(0.1)
        return model, tok

    def shard(model, *arguments):
        n = sum(p.numel() for p in model.parameters())
        model = real_shard(model, *arguments)
        if os.path.exists(lock) and refs:  # not a value head
            part = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())
            assert part < 0.6 * 4 * n, f"{part} bytes of {n} parameters"
            gone(refs, "whole weights")
            gone(before, "models of earlier runs")
            refs.clear()
            models.append(weakref.ref(model))
            os.rmdir(lock)
        return model
    for module in (sft, rl):
        def go(name, steps, play=quick, **more):
            before.extend(models)
            models.clear()
            name = f"{module.__name__}-{name}"
            play(module.main, two_rank_flags(module, path, steps, 2, name=name, **more))
        with mock.patch.object(sft, "load", load), mock.patch.object(sft, "shard", shard), \
                watching(ev, "load", lambda *_: gone(models, "trained models, with the table's,")):
            go("two", 2, episodes=1, play=quiet)
            go("bf16", 1, dtype="bf16", activation_checkpointing=True)
            with watching(module, "clip_and_step", lambda *_: signal.raise_signal(signal.SIGTERM)), \
                    watching(sft, "print0", lambda _, machine, *words: told.extend(words)):
                equal(raises(SystemExit, "", lambda: go("resumed", 2)), "130", "exit code")
            assert told[-1].startswith("stopped; go on with it: torchrun --nproc_per_node=2 "), told
            go("resumed", 2, resume=True)


def test_torchrun_is_one_process():
    """Two ranks train as one process does with the data of both; stopped and resumed too, to the bit."""
    real_rows, real_rollout = sft.batch_rows, ev.rollout

    def rows_of_both(args, env, tok, model, step, rank):
        args = SimpleNamespace(**{**vars(args), "batch": 2})
        return [row for rank in (0, 1) for row in real_rows(args, env, tok, model, step, rank)]

    def rollout_of_both(policy, tok, envs, seeds, *more):
        episodes = []
        for rank in (0, 1):
            mine = [f"{seed.rsplit('/', 2)[0]}/{rank}/{i}" for i, seed in enumerate(seeds[:2])]
            torch.manual_seed(random.Random(mine[0].rpartition("/")[0]).randrange(2 ** 31))
            episodes += real_rollout(policy, tok, envs[:2], mine, *more)
        return episodes
    with folder() as path:
        home = f"{path}/out/virl/id"
        save(f"{home}/init", *tiny("virl"), seed=3, model=None, pixels=None, data=None, stage="init")
        torch.multiprocessing.spawn(on_a_rank, (path, torchrun_work), nprocs=2)
        for module, key in ((sft, "loss"), (rl, "reward")):
            name = module.__name__
            one, two, resumed = (f"{home}/{name}-{kind}" for kind in ("one", "two", "resumed"))
            with mock.patch.object(sft, "batch_rows", rows_of_both), \
                    mock.patch.object(rl, "rollout", rollout_of_both):
                quick(module.main, two_rank_flags(module, path, 2, 4, name=f"{name}-one"))
            assert same(weights(two), weights(resumed)), f"{name}: resumed, other weights"
            error_of("trained by 2 processes, and this is 1", module.main,
                     f"--env virl --out {path}/out --name {name}-resumed --resume")
            for kind in (two, resumed):
                both = [[(r[key], r["grad_norm"], r["flops"]) for r in records(n, key)] for n in (kind, one)]
                near(*both, 1e-4, f"{kind}: {key}, gradient norm, flops")
                equal(len(both[0]), 2, "records")
            # AdamW divides by the gradient's size: where that is small, rounding counts as much
            near(*(torch.cat([x.flatten() for x in weights(n).values()]) for n in (two, one)), 1e-4, name)
            plain = hf.AutoModelForCausalLM.from_pretrained(ev.checkpoint_at(two))
            assert same(plain.state_dict(), weights(two)), "what transformers loads"
            a, b = (ev.checkpoint_at(n) for n in (two, one))
            equal(sorted(os.listdir(a)), sorted(os.listdir(b)), "files")
            equal(*(os.path.getsize(f"{n}/model.safetensors") for n in (a, b)), "bytes")


def test_interruptions():
    """A damaged line of the log; NaN while sampling; no resource module, as on Windows; memory on macOS."""
    with folder(init=True) as out:
        path = f"{out}/gp/id/half"
        quick(sft.main, flags(out, 1, name="half"))
        with open(f"{path}/metrics.jsonl", "ab") as f:
            f.write(b'{"step": 9, "loss": 1}\n{"step": 1, "loss": \xff\x00 half a line\n[1]\n')
        quick(sft.main, flags(out, 2, name="half", resume=True))
        equal([r["step"] for r in records(path, "loss")], [1, 2], "steps in the log")
        shutil.rmtree(ev.checkpoint_at(path))
        quick(sft.main, flags(out, 2, name="half", resume=True))
        equal([r["step"] for r in records(path, "seen")], [0, 2], "evaluations of a run that began anew")
        put(f"{out}/gp/id/init", "metrics.jsonl", b"all is damaged")
        quick(sft.main, f"--stage init --out {out} --resume")  # a finished run's table
        kinds = [("stage" in r, "ood" in r) for r in records(f"{out}/gp/id/init")]
        equal(kinds, [(True, False), (False, True)], "records")

        model, tok = ev.load(f"{out}/gp/base")
        model.model.norm.weight.data.fill_(math.nan)
        save(f"{out}/nan", model, tok)
        error_of("logits are not finite", ev.main, f"--models {out}/nan --out {out} --episodes 2")
        error_of("logits are not finite", rl.main, flags(out, init=f"{out}/nan"))
    with mock.patch.dict(sys.modules, resource=None):
        assert math.isnan(runpy.run_path(os.path.join(HERE, "sft.py"))["peak_memory_gb"](cpu()))
    peak = SimpleNamespace(ru_maxrss=2 ** 30)
    for platform, gigabytes in (("darwin", 1), ("linux", 1024)):
        with mock.patch.object(sys, "platform", platform), \
                mock.patch.object(sft.resource, "getrusage", lambda _: peak):
            equal(sft.peak_memory_gb(cpu()), gigabytes, platform)


def test_bad_input_gets_one_clear_line():
    """Bad flags, bad folders and diverging runs. No file is changed."""
    model, tok = tiny()
    with folder(init=True) as out:
        for name in ("half", "none", "wide", "short"):
            save(f"{out}/{name}", model, tok)
        os.truncate(f"{out}/half/model.safetensors", 100_000)
        os.remove(f"{out}/none/model.safetensors")
        for name, changed in (("wide", {"intermediate_size": 64}),
                              ("short", {"max_position_embeddings": 64})):
            put(f"{out}/{name}", "config.json", json.dumps({**model.config.to_dict(), **changed}).encode())
        config = hf.Qwen2Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                num_attention_heads=2, num_key_value_heads=2, vocab_size=300)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(f"{out}/wordless")  # no tokenizer's files
        config.num_hidden_layers = -1
        put(f"{out}/wordless/bad", "config.json", json.dumps(config.to_dict()).encode())
        for name in ("state", "tensors", "keys"):
            quick(sft.main, flags(out, name=name))
        put(ev.checkpoint_at(f"{out}/gp/id/keys"), "state.json", b'{"step": 1, "world": 1}')
        put(ev.checkpoint_at(f"{out}/gp/id/state"), "state.json", b"junk")
        os.truncate(f"{ev.checkpoint_at(f'{out}/gp/id/tensors')}/optimizer.pt", 10_000)
        kept = tree(out)
        for words, main, line in (  # --out comes first: a line may have another one
                ("unrecognized arguments: --rul", rl.main, "--rul id"),
                ("invalid choice", rl.main, "--rule sideways"), ("--lr", rl.main, "--lr -1"),
                ("--verify", rl.main, "--verify 0"), ("--gamma", rl.main, "--gamma 2"),
                ("--batch", sft.main, "--batch many"), ("--tokens", sft.main, "--tokens nan"),
                ("--seed", rl.main, f"--seed {10 ** 30}"),
                ("--demos", sft.main, "--demos nobody"), ("need --vl", ev.main, "--pixels 80"),
                ("need --vl", ev.main, "--visual ood"),
                ("--model", sft.main, f"--stage base --model x --out {out}/empty"),
                ("--device", ev.main, "--device toaster"), ("temperature", rl.main, "--temperature 0"),
                ("no checkpoints", ev.main, f"--out {out}/empty"),
                ("nothing to print", ev.main, "--episodes 0"),
                ("nowhere", ev.main, f"--models {out}/nowhere"), ("half", ev.main, f"--models {out}/half"),
                ("none", ev.main, f"--models {out}/none"), ("nowhere", rl.main, f"--init {out}/nowhere"),
                ("another shape .*layers", ev.main, f"--models {out}/wide"),
                ("cannot spell 24", sft.main, flags(f"{out}/nothing", model=f"{out}/wordless")),
                ("cannot load .*: .*: .*layer", ev.main, f"--models {out}/wordless/bad"),
                ("--minibatches", rl.main, "--batch 2 --minibatches 3"),
                ("context of 64", ev.main, f"--models {out}/short --max_new_tokens 60"),
                ("route_infos.json", ev.main, f"--env virl --data {out} --models {out}/short"),
                ("route_infos.json", sft.main, flags(f"{out}/nothing", env="virl", data=out)),
                ("--data", ev.main, f"--data {out} --models {out}/gp/base"),
                ("reads only text", sft.main, flags(out, init=f"{out}/gp/base", vl=True)),
                ("reads only text", ev.main, f"--vl --models {out}/gp/base"),
                ("state.json is missing or damaged", rl.main, flags(out, init=f"{out}/gp/id/state")),
                ("state.json is missing or damaged", sft.main, flags(out, 2, name="state", resume=True)),
                ("state.json is damaged: it has no flops", rl.main, flags(out, init=f"{out}/gp/id/keys")),
                ("state.json is damaged: it has no flops", sft.main, flags(out, 2, name="keys", resume=True)),
                ("optimizer.pt is missing or damaged", sft.main, flags(out, 2, name="tensors", resume=True)),
                ("--stage init has its own", sft.main, f"--stage init --init {out}/wide --name x"),
                ("--name: a base", sft.main, flags(out, stage="base", name="b")),
                ("--name base is the name", sft.main, flags(f"{out}/empty", name="base")),
                ("--name init is the name", rl.main,
                 flags(f"{out}/empty", name="init", init=f"{out}/gp/base")),
                ("gp/base exists", sft.main, flags(out, stage="base"))):
            error_of(words, main, f"--out {out} {line}")
        met_while_playing = env_virl.DataError("route 3: street_views/x.jpg: cannot be read")
        damaged = mock.Mock(side_effect=met_while_playing)
        error_of("route 3", lambda _: ev.script(damaged), "")
        with mock.patch.object(sft, "write_json", side_effect=OSError("the disk is full")):
            error_of("cannot write to .*full/gp/id/init: the disk", sft.main,
                     flags(f"{out}/full", stage="init", init=None, model=f"{out}/gp/base"))
        equal(os.listdir(f"{out}/full/gp/id"), [], "folders of a run that could not begin")
        shutil.rmtree(f"{out}/full")
        equal(tree(out), kept, "files")
        assert not os.path.exists(f"{out}/nothing")
        for words, main in (("not finite|loss is", sft.main), ("not finite", rl.main)):
            error_of(words, main, flags(out, 9, name="wild", lr="1e20"))
            shutil.rmtree(f"{out}/gp/id/wild")
        equal(tree(out), kept, "files")
    two = SimpleNamespace(**{**vars(cpu()), "world": 2})
    for names in (None, {"GPT2Block"}):
        with mock.patch.object(model, "_no_split_modules", names):
            raises(SystemExit, "does not name its blocks", lambda: sft.shard(model, two, torch.float32))


def test_rows_of_a_table_have_one_limit():
    """All answers are cut at the flag's length, else at the runs' longest. A line tells of a model of another
    rule, task or visual variation."""
    made_with = {"released": {}, "init": {"max_new_tokens": 60, "stage": "init", "rule": "ood"},
                 "rl": {"max_new_tokens": 40, "stage": "rl", "rule": "id", "env": "gp"},
                 "base": {"stage": "base", "rule": "ood", "env": "virl"}, "red": {"visual": "ood"}}
    lines = {"init": "init was trained on rule ood; the columns are of rule id\n",
             "base": "base was trained on env virl; the columns are of env gp\n",
             "red": "red was trained on visual ood; the columns are of visual id\n",
             "rl": "rl was trained on env gp; the columns are of env virl\n"}
    machine = SimpleNamespace(rank=0, world=1, device=None, frozen=None)
    for names, line, limit, told_of in (
            ("released init rl", "", 60, "init"), ("released base", "", 256, "base"),
            ("released rl", "--max_new_tokens 9", 9, ""), ("red init", "--vl --pixels 80", 60, "red init"),
            ("red", "", 256, ""),  # without --vl the table has no pictures
            ("rl", "--env virl --data x", 256, "rl")):  # it was not trained on these routes
        limits, paths = [], {name: name for name in names.split()}
        nothing = {name: lambda *_, **__: None for name in ("check_model", "make", "print_table")}
        with mock.patch.multiple(ev, saved_args=made_with.get, load=lambda *_: (None, None),
                                 evaluate=lambda *_: {}, **nothing), \
                watching(ev, "evaluate", lambda _, model, tok, args, *__: limits.append(args.max_new_tokens)):
            told = printed(ev.table, paths, parsed(line), machine)
        equal(limits, [limit] * len(paths), names)
        equal(told, "".join(lines.get(name, "") * (name in told_of) for name in names.split()), names)


def test_table_says_where_its_pictures_are_from():
    """Of the visual variations the one that is trained and, if it has a column, the other one."""
    cell = {**ev.rate([1]), "matters": ev.rate([1]), "episode": ev.rate([1])}
    row = {"name": "x", **dict.fromkeys(("seen", "id", "ood", "visual"), cell)}
    with folder() as data:
        for there, line, words in (
                (False, "", "trained on cities by day; visual OOD is other cities, by night"),
                (False, f"--data {data}", f"trained on {data}"),
                (True, f"--data {data}", f"trained on {data}; visual OOD is {data}/ood"),
                (True, f"--data {data} --visual ood", f"trained on {data}/ood; visual OOD is {data}")):
            if there:
                os.makedirs(f"{data}/ood", exist_ok=True)
            text = printed(ev.print_table, [row], parsed(f"--env virl --vl {line}"))
            assert f"pictures: {words}\n" in text, (words, text)


def test_command_line_from_an_empty_folder():
    """The main job with a small budget: base, init, PPO, SFT, the table. PPO and eval.py run as typed."""
    with folder() as out:
        task, budget = f"--env gp --rule ood --out {out}", "--tokens 2e3 --batch 8"
        small = f"--rule ood --out {out} --episodes 6 --max_new_tokens 24 --evaluations 1 --verify 1"
        for line, parts in (
                ("sft.py --stage base --tokens 3e3", ("[base] gp", "base  ", f"next: python rl.py {task}\n")),
                ("sft.py --stage init --tokens 2e3 --batch 8", ("[init] gp", "base  ", "init  ")),
                (f"rl.py {budget}", (
                    "[rl] step    0   0% seen 0.", "trained on rule ood", "held out is rule id",
                    "ID (rule ood)", "OOD (rule id)", "base  ", "init  ", "rl  ",
                    f"next: python sft.py {task} --tokens 2000 ")),
                (f"sft.py {budget}", ("[sft] gp", "init  ", "sft  ", "rl  ", "1 attempts"))):
            script, _, line = f"{line} {small}".partition(" ")
            text = quiet(sft.main, line) if script == "sft.py" else command(script, *line.split())
            equal([part for part in parts if part not in text], [], text)
        text = command("eval.py", *f"--rule ood --out {out} --episodes 4".split())
        assert "where the rules differ" not in text, text
        tables = [ev.read_json(f"{out}/gp/ood/{file}") for file in ("rl/eval.json", "eval.json")]
        settings = [(t["trained_rule"], t["verify"], t["episodes"]) for t in tables]
        equal(settings, [("ood", 1, 6), ("ood", 5, 4)], "settings")
        names = [[r["name"] for r in t["rows"]] for t in tables]
        equal(names, [["base", "init", "rl"], ["base", "init", "sft", "rl"]], "rows")
        for r, column in itertools.product(tables[0]["rows"], ("seen", "id", "ood")):
            assert 0 <= r[column]["p"] <= 1 and r[column]["n"] == 6, r
        of_sft, of_rl = ([r["flops"] for r in records(f"{out}/gp/ood/{name}", "flops")]
                         for name in ("sft", "rl"))
        equal((of_sft, of_rl), (sorted(of_sft), sorted(of_rl)), "flops")
        assert of_sft[0] == of_rl[0] > 0  # both start with the init's share


def test_command_lines_of_all_tasks():
    """rl.py from an empty folder: what is printed. The log's first and last success rates are the table's."""
    for env, vl, words in (("gp", False, ["J, Q, K = 10"]), ("gp", True, ["black suits"]),
                           ("virl", False, ["absolute directions", "where the rules differ"]),
                           ("virl", True, ["cities by day", "where the rules differ"])):
        task = f"--env {env} --episodes 2 --max_new_tokens 6 --verify 1" + " --vl --visual id" * vl
        words += ["[base]", "[init]", "[rl]", "next: python sft.py", "KEY "]
        words += ["visual OOD", "parts of pictures read", "--vl"] * vl
        with folder() as out, tiny_stages(), mock.patch.dict(sft.EVERY, eval_episodes=2):
            small = f"{task} --out {out} --tokens 1.5e3 --batch 4"
            with watching(sft, "table", lambda table, *_: table["rows"][-1]["id"].update(last=True)):
                text = quiet(rl.main, f"{small} --minibatches 1")  # the rates of all rows may be 0
            equal([part for part in words if part not in text], [], text)
            equal(text.count("success in %"), 1, "tables: none of an earlier stage")
            place = f"{out}/{env}-vl/id-id" if vl else f"{out}/{env}/id"
            table, log = ev.read_json(f"{place}/rl/eval.json")["rows"], records(f"{place}/rl", "flops")
            rows = {r["name"]: r for r in table}
            for r, name in ((log[0], "init"), (log[-1], "rl")):
                for column in ("seen", "id", "ood"):
                    equal(r[column], rows[name][column], f"{name}: {column}")
            [first, *_] = records(f"{place}/rl", "reward")
            assert first["ratio_error"] < 1e-5 and abs(first["kl1"]) < 1e-6, first
            equal("recognized" in first, vl, "is recognition logged")
            if vl:
                equal(set(rows["rl"]["visual"]["recognition"]), {"p", "se", "n", "whole", "solved"})
            if env == "gp" and not vl:  # --evaluations 0: none on the way, only the table's row in the end
                quiet(sft.main, f"{small} --evaluations 0")
                equal(["loss" in r for r in records(f"{place}/sft", "flops")][-2:], [True, False])
                equal(len(records(f"{place}/sft", "seen")), 1)
            if vl and env == "gp":  # it does the task in words too
                line = f"--out {out} --models {place}/rl --episodes 2 --max_new_tokens 6"
                text = quiet(ev.main, line)
                assert "visual OOD" not in text and "rl  " in text
                error_of("--pixels 80", ev.main, f"{task} --out {out} --pixels 120")


def test_figures():
    """Means, paired differences, the chosen rate, what is refused; t test, Holm; README's table of memory."""
    def write(path, seed, p, **other):
        def row(name, by_id, seen=0.9):
            rates = {"seen": seen, "id": by_id, "ood": p}
            return {"name": name, **{c: {"p": q, "se": 0.1, "n": 50} for c, q in rates.items()}}
        rows = [row("init", p), row("sft-1", p + 0.3, 0.5), row("sft-2", p + 0.1 + 0.1 * seed)]
        ev.write_json(path, {"env": "gp", "vl": False, "trained_rule": "id", "trained_visual": None,
                             "verify": 5, "temperature": 1.0, "episodes": 50, "seed": seed, **other,
                             "rows": rows})
        return path
    file = os.path.join(HERE, "results", "figures.py")
    with folder() as out:
        os.mkdir(f"{out}/raw")
        files = [write(f"{out}/raw/a-gp-s{seed}.json", seed, p) for seed, p in ((0, 0.1), (1, 0.2), (2, 0.6))]
        text = command(file, "table", *files)
        assert "10.0  20.0  60.0 |  30.0" in text and "id  +10.0  +20.0  +30.0 |  +20.0,  3.5" in text, text
        assert "chosen by ID: sft-2" in command(file, "choose", *files)  # sft-1 has not learnt its hands
        for other in (files[0], write(f"{out}/v.json", 4, 0.2, verify=1)):
            assert "another seed" in command(file, "table", files[0], other, code=1)
        put(out, "v.json", b'{"env": "gp"')
        assert "v.json" in command(file, "table", files[0], f"{out}/v.json", code=1)
        put(out, "claims.txt", b"""a a-gp within id sft-1 > init
a a-gp within id sft-2 < init  # it is larger, by 10, 20 and 30 points: t = 3.5
a a-gp within id sft-2 > init
a a-gp within id sft-2 < sft-1  # by 20 and 10 points, and not in seed 2
a a-gp within id rl > init
b b-gp within id sft-1 > init
""")
        figures = runpy.run_path(file)
        figures["print_claims"].__globals__["CLAIMS"] = f"{out}/claims.txt"
        lines = printed(figures["print_claims"], "a").splitlines()[1:]
        verdicts = [line.split("|")[-1].strip() for line in lines]
        equal(verdicts, ["established", "no", "tendency", "unclear", "not run"], lines)
    for df, quantile in enumerate((12.706, 4.303, 3.182, 2.776, 2.571), 1):  # of Student's t, two-sided 95%
        within(0.0499, figures["p_value"](quantile, df), 0.0501, f"p with {df} degrees of freedom")
    equal(figures["holm"]([0.04, 0.01, 0.03]), [False, True, False])  # 0.03 > 0.05 / 2, so 0.04 is not asked
    equal(figures["holm"]([0.012, 0.04, 0.013]), [True, True, True])
    with mock.patch.object(sys, "argv", ["figures.py", "memory"]):
        table = printed(lambda: runpy.run_path(file, run_name="__main__"))
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
        assert table.count("\n") == 6 and table in f.read(), f"expected in README.md:\n{table}"


def test_results_are_what_their_commands_print():
    """What results/tables holds is made again from the raw files by the commands in it."""
    if not os.path.isdir(os.path.join(HERE, "results", "raw")):
        return  # a starter
    files = glob.glob(os.path.join(HERE, "results", "tables", "*.txt"))
    assert len(files) > 15
    for file in files:
        with open(file, encoding="utf-8") as f:
            shown = re.split(r"^python (results/.*)\n", f.read(), flags=re.M)  # ["", command, output, ...]
        for words, expected in zip(shown[1::2], shown[2::2]):
            done = subprocess.run(["bash", "-c", f'"$0" {words}', sys.executable], cwd=HERE,
                                  capture_output=True, text=True)
            made, kept = (text.rstrip("\n").splitlines() for text in (done.stdout, expected))
            equal(made, kept, words + done.stderr)


# ------------------------------------------------------------------------------------------------------------
# Pictures through the model: tiny random checkpoints of the families that users bring, see FAMILIES above.

def qwen_processor(tok):
    """Qwen2.5-VL's processor without its video half, which needs torchvision."""
    images = hf.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    with mock.patch.object(hf.Qwen2_5_VLProcessor, "check_argument_for_proper_class"):  # which asks for it
        return hf.Qwen2_5_VLProcessor(images, tok, None, tok.chat_template)


def tiny_vlm(family):
    """A random tiny vision-language model -> (model, tokenizer with .processor)."""
    model, tok = sft.build_tiny("gp", 0, vl=family == "llava")
    if family == "llava":
        return model, tok
    special, place = {
        "mllama": (["<|python_tag|>", "<s>", "<|image|>"], "<|image|>"),
        "idefics3": (["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"],
                     "<image>"),
        "qwen2_5_vl": (["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
                       "<|vision_start|><|image_pad|><|vision_end|>")}[family]
    tok.add_special_tokens({"additional_special_tokens": special})
    tok.chat_template = sft.CHAT_TEMPLATE.replace("<image>", place)
    ids = dict(zip(special, tok.convert_tokens_to_ids(special)))
    text = dict(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
                pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, image_size=40)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if family == "mllama":
        tok.bos_token = "<s>"
        images = hf.MllamaImageProcessorPil(size={"height": 40, "width": 40}, max_image_tiles=2)
        tok.processor = hf.MllamaProcessor(images, tok, tok.chat_template)
        assert ids["<|image|>"] == len(tok) - 1  # as in the real one, the mark has an embedding and no logit
        text.update(vocab_size=len(tok) - 1, cross_attention_layers=[1], bos_token_id=ids["<s>"],
                    rope_parameters=rope)
        vision.update(num_global_layers=1, attention_heads=2, patch_size=20, max_num_tiles=2,
                      vision_output_dim=64, intermediate_layers_indices=[0],
                      supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]])
        config = hf.MllamaConfig(image_token_index=ids["<|image|>"], text_config=text, vision_config=vision)
    elif family == "idefics3":
        edge = {"longest_edge": 40}
        images = hf.Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
        tok.processor = hf.Idefics3Processor(images, tok, image_seq_len=4, chat_template=tok.chat_template)
        text.update(model_type="llama")
        vision.update(num_attention_heads=2, patch_size=10)
        config = hf.Idefics3Config(image_token_id=ids["<image>"], pad_token_id=tok.pad_token_id,
                                   scale_factor=2, text_config=text, vision_config=vision)
    else:
        text.update(rope_parameters={**rope, "mrope_section": [2, 3, 3]})
        vision = dict(depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=64,
                      fullatt_block_indexes=[0])
        names = "vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **dict(zip(names, ids.values())))
    model = hf.AutoModelForImageTextToText.from_config(config)
    for name, p in model.named_parameters():
        if "gate" in name and "proj" not in name:  # Mllama's begin closed and let no picture through
            p.data.fill_(0.5)
    return model, tok


def test_vl_damaged_processor():
    """Where a processor is damaged, pictures give one line with its name, and tasks in words still run."""
    for damage in (b"{ no json", b'{"image_processor_type": "Unheard"}', None):
        with folder() as out:
            save(f"{out}/m", *tiny("llava"))
            for file in os.listdir(f"{out}/m"):
                if "processor" in file:
                    put(f"{out}/m", file, damage)
            error_of("processor cannot be loaded", rl.main, f"{SMALL} --init {out}/m --vl --out {out}")
            [episode] = ev.rollout(*ev.load(f"{out}/m"), [GeneralPoints(verify=1)], [0], 1.0, 4, cpu())
            assert episode.turns


def test_vl_models_do_tasks_in_words():
    """A vision-language model plays the task in words: no picture is passed, prompts have no image place."""
    for family in PICTURES:
        model, tok = tiny(family)
        torch.manual_seed(0)
        envs = [GeneralPoints(verify=2) for _ in range(3)]
        episodes = ev.rollout(model, tok, envs, range(3), 1.0, 8, cpu())
        segments = [e.segments[0] for e in episodes]
        equal([(s.pictures, picture_places(model, s)) for s in segments], [({}, [])] * 3, family)
        assert torch.isfinite(ev.score(model, segments, tok.pad_token_id, cpu())[0]).all(), family


def test_vl_processor_round_trip():
    """From disk the tiny model's processor makes the same ids and pixels; the pixels are the picture's."""
    tok, fresh = tiny("llava")[1], sft.build_tiny("gp", 0, vl=True)[1]
    for i in range(3):
        messages, images = GeneralPoints(vl=True).reset(i)
        a, b = ev.prompt(tok, messages, images), ev.prompt(fresh, messages, images)
        pixels = a.pictures["pixel_values"]
        assert a.ids == b.ids and torch.equal(pixels, b.pictures["pixel_values"])
        places = a.ids.count(tok.convert_tokens_to_ids("<image>"))
        equal((pixels.shape, places), ((1, 3, 80, 80), 16), "pixels, places")
        plain = torch.tensor(list(images[0].tobytes())).view(80, 80, 3).permute(2, 0, 1) / 255
        channels = torch.corrcoef(torch.cat([pixels[0], plain]).flatten(1)).diagonal(3)
        assert (channels > 0.999).all(), channels  # normalised, nothing else


def test_assignments():
    """Each exercise of the class refuses wrong answers and takes the solution; make.py works."""
    file = os.path.join(HERE, "assignments", "test_class.py")
    if os.path.exists(file):  # a student's copy has none
        text = command(file)
        assert re.search(r"^[1-9]\d* passed, 0 failed$", text.strip().splitlines()[-1]), text


# ------------------------------------------------------------------------------------------------------------

def run(name):
    """Run one test -> its name, seconds, and what went wrong, "" for nothing."""
    start, trouble = time.perf_counter(), ""
    try:
        globals()[name]()
    except (Exception, SystemExit):  # a script's exit is a failure too
        trouble = traceback.format_exc()
    return name, time.perf_counter() - start, trouble


def one_thread():
    """Tests run side by side: each process takes one thread, and so do the commands that it starts."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def main(names):
    """Run the tests that the command line names, side by side; one test in this process, where a debugger can
    stop it. A name that fits none ends the run."""
    begin, tests, failed = time.perf_counter(), [name for name in globals() if name.startswith("test_")], []
    fits = {name: [test for test in tests if name in test] for name in names}
    if not all(fits.values()):
        sys.exit("error: no test's name contains " + next(name for name in names if not fits[name])
                 + "; there are " + ", ".join(name.removeprefix("test_") for name in tests))
    tests = [name for name in tests if not names or name in itertools.chain(*fits.values())]
    processes = min(4, os.cpu_count() or 1, len(tests))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), one_thread) as pool:
        if processes == 1:
            done = map(run, tests)
        else:  # the slow ones, last in this file, come first
            futures = [pool.submit(run, name) for name in reversed(tests)]
            done = (future.result() for future in as_completed(futures))
        for name, seconds, trouble in done:
            print(f"FAIL  {name}\n{trouble}" if trouble else f"ok    {name}  {seconds:.1f} s", flush=True)
            failed += [name] * bool(trouble)
    print(f"{time.perf_counter() - begin:.0f} s" + "".join(f"\nfailed: {name}" for name in failed))
    print(f"{len(tests) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
