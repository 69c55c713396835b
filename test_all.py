"""test_all.py: every claim about correctness, as a test. Also the checker of the assignments in the README.

    python test_all.py             # all, about four minutes on two cores; the last line is "N passed, N failed"
    python test_all.py gae kl      # the tests whose name contains "gae" or "kl"
    pytest test_all.py             # the same, if you have pytest

No test downloads anything: real model classes are tested through tiny random checkpoints that the test saves.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import env_gp
import env_virl
import eval as ev
import rl
import sft
import verifier
from env_gp import RULES, GeneralPoints, all_hands, solutions
from env_virl import VIRL
from verifier import (COMPASS, GP_REWARD, RELATIVE, VIRL_FEEDBACK, VIRL_REWARD, FormulaError, Step, compass_word, evaluate_formula,
                      judge_gp, judge_virl, last_json_object, relative_word)

HERE = os.path.dirname(os.path.abspath(__file__))


# ----------------------------------------------------------------------------------------------------------------------
# Helpers.

def cpu(dtype="fp32"):
    return ev.setup(SimpleNamespace(device="cpu", dtype=dtype))


@functools.lru_cache(maxsize=None)
def tiny(env=GeneralPoints):
    """A random tiny model whose samples vary, and its tokenizer."""
    model, tok = sft.build_tiny(env, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5 if p.ndim == 2 else 1.0)
    # Several end tokens, as real models have: with 30 of 512 most random answers end by themselves, and some do not.
    model.generation_config.eos_token_id = [tok.eos_token_id, *range(300, 330)]
    model.generation_config.pad_token_id = tok.pad_token_id
    return model.eval(), tok


def played(n=12, temperature=1.0, verify=3, max_new_tokens=24, env=GeneralPoints):
    """Random multi-turn episodes of the tiny model."""
    model, tok = tiny(env)
    torch.manual_seed(1)
    envs = [env(verify=verify) for _ in range(n)]
    return ev.rollout(model, tok, envs, [f"t{i}" for i in range(n)], temperature, max_new_tokens, cpu())


@contextlib.contextmanager
def folder():
    path = tempfile.mkdtemp()
    try:
        yield path
    finally:
        shutil.rmtree(path)


def quiet(main, argv):
    """Run a script's main() in this process -> what it printed. Exits count as exceptions."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(argv)
    return out.getvalue()


def error_of(main, argv):
    """The one clear line a script ends with on bad input; it must be an exit with a code that is not 0."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            quiet(main, argv)
    except SystemExit as e:
        assert e.code not in (0, None), "ended with exit code 0"
        message = (e.code if isinstance(e.code, str) else err.getvalue()).strip()
        assert message.startswith("error: ") and "\n" not in message, f"not one clear line: {message}"
        return message
    raise AssertionError(f"no error for {argv}")


def command(*argv, code=0):
    """Run `python ...` in a process of its own, two threads at most -> its output."""
    done = subprocess.run([sys.executable, *argv], cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{argv}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def weights(path):
    return {k: v.clone() for k, v in ev.load(path)[0].state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def records(path):
    with open(os.path.join(path, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def close(a, b, tol=1e-5):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), atol=tol, rtol=tol)


SMALL = ["--monitors", "1", "--monitor_episodes", "4", "--episodes", "6", "--max_new_tokens", "24", "--seed", "3",
         "--verify", "2"]


@functools.lru_cache(maxsize=None)
def small_init():
    """An out/ folder with a hardly trained base and init, made once for all tests that need one."""
    out = tempfile.mkdtemp()
    import atexit
    atexit.register(shutil.rmtree, out, True)
    quiet(sft.main, ["--stage", "base", "--tokens", "6e4", "--out", out] + SMALL)
    quiet(sft.main, ["--stage", "init", "--tokens", "1e4", "--out", out] + SMALL)
    return out


def copy_of_init(path):
    shutil.copytree(small_init(), path, dirs_exist_ok=True)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# verifier.py

def test_verifier_verdicts_and_rewards():
    def judge(formula, numbers=(3, 3, 8, 8), **kw):
        v = judge_gp(json.dumps({"cards": ["3", "3", "8", "8"], "number": list(numbers), "formula": formula}), list(numbers), **kw)
        assert v.reward == GP_REWARD[v.kind]
        return v.kind, v.reward
    assert judge("8/(3-8/3)") == ("correct", 5)
    assert judge(" 8 / ( 3 - 8 / 3 ) = 24 ") == ("correct", 5)
    assert judge("8/(3-8/3)=23") == ("wrong_value", -1)
    assert judge("8*3+8-3") == ("wrong_value", -1)
    assert judge("8*3") == ("wrong_numbers", -2)
    assert judge("8+8+8+0") == ("wrong_numbers", -2)
    assert judge("88/(3-3)") == ("illegal", -3)
    for bad in ("", "8*", "-8+8", "(8", "8)", "8 8", "2^3", "8//3", "8**3", "abc", "8/(3-3)", "٨+٨", "８", "1e3", "1_0", "0x8", "8.0",
                "9" * 5, "(" * 40 + "8" + ")" * 40, "=24", "8=", "8=24=24", "24=8*3", "\x008", None, 7, [1], {"a": 1}, True):
        assert judge(bad)[0] == "illegal", bad
    assert judge("8/(3-8/3)", cards=["3", "8", "8", "3"]) == ("correct", 5)
    assert judge("8/(3-8/3)", cards=["3", "8", "8", "4"]) == ("misread", -1.5)  # decided first, though the formula is right
    assert judge("nonsense", cards=["3", "8", "8", "4"]) == ("misread", -1.5)
    assert judge("12*2", numbers=(12, 2), target=24) == ("correct", 5) and judge("12*2", numbers=(12, 2), target=25)[0] == "wrong_value"


def test_verifier_feedback_gives_nothing_away():
    for kind, text in verifier.GP_FEEDBACK.items():
        assert not re.search(r"[0-9]", text) and (kind == "correct") != text.endswith("Try again.")
    assert set(verifier.GP_FEEDBACK) == set(GP_REWARD)


def test_verifier_reads_the_last_object():
    assert last_json_object('first {"formula": "1"} then {"formula": "2"} done')["formula"] == "2"
    assert last_json_object('{"formula": {"a": 1}}') == {"formula": {"a": 1}}
    assert last_json_object('```json\n{"formula": "4*6"}\n```') == {"formula": "4*6"}
    assert last_json_object('{"a": 1') is None and last_json_object("[1]") is None and last_json_object("") is None


def test_verifier_survives_anything():
    """The nasty list, then thousands of random and mutated answers: never an exception, never slow."""
    nasty = ['{"formula": "9**9**9"}', "[" * 10_000, "{" * 10_000, '{"a":' * 10_000, '{"formula": "' + "(" * 10_000 + '"}', "null", "7",
             '{"formula": ' + "9" * 10_000 + "}", '{"formula": "' + "9" * 10_000 + '"}', "\x00", "\ud800", "{" + "}" * 10_000, "NaN",
             '{"formula": NaN}', '{"formula": 1e999}', '{"formula": "' + "1*" * 60 + '1"}', '{"cards": null}', '{"cards": [[[]]]}',
             '{"formula":"' + "9999*" * 25 + '9"}']
    good = '{"cards": ["3", "3", "8", "8"], "number": [3, 3, 8, 8], "formula": "8/(3-8/3)"}'
    rng = random.Random(0)
    alphabet = '0123456789+-*/()=" {}[],:.abcJQK\\\n٣８½²\x00\ud800'
    for text in nasty:
        start = time.perf_counter()
        for cards in (None, ["3"]):
            assert judge_gp(text, [3, 3, 8, 8], cards=cards).kind in GP_REWARD
        assert time.perf_counter() - start < 1.0, text[:40]
    start = time.perf_counter()
    for i in range(6000):
        if i % 2:
            text = "".join(rng.choices(alphabet, k=rng.randrange(80)))
        else:
            chars = list(good)
            for _ in range(rng.randrange(1, 6)):
                chars[rng.randrange(len(chars))] = rng.choice(alphabet)
            text = "".join(chars)
        assert judge_gp(text, [3, 3, 8, 8], cards=["3", "3", "8", "8"] if i % 3 else None).kind in GP_REWARD
    assert time.perf_counter() - start < 10


def test_verifier_agrees_with_an_independent_oracle():
    """All solutions of all hands, and random formulas: Python's own parser over Fractions must say the same."""
    def oracle(text):  # legal formulas only, so Python's grammar and ours agree
        return eval(re.sub(r"([0-9]+)", r"Fraction(\1)", text), {"Fraction": Fraction})
    rng, checked = random.Random(0), 0
    for hand in all_hands():
        for formula in solutions(hand):
            assert oracle(formula) == 24 and judge_gp(json.dumps({"formula": formula}), list(hand)).kind == "correct"
            checked += 1
        wrong = env_gp.wrong_formula(hand, rng)
        try:
            truth = oracle(wrong)
        except ZeroDivisionError:
            truth = None
        kind = judge_gp(json.dumps({"formula": wrong}), list(hand)).kind
        assert kind == ("illegal" if truth is None else "correct" if truth == 24 else "wrong_value"), wrong
    assert checked > 4000


def test_formula_values_and_numbers():
    assert evaluate_formula("8/(3-8/3)") == (Fraction(24), [8, 3, 8, 3])
    assert evaluate_formula("2-3-4") == (Fraction(-5), [2, 3, 4]) and evaluate_formula("8/4/2")[0] == 1
    for text in ("", "1+", "(1", "1)", "+1", "1/0", "1" * 200):
        try:
            evaluate_formula(text)
        except FormulaError as e:
            assert str(e)
        else:
            raise AssertionError(text)


def test_verifier_speed():
    answers = [json.dumps({"cards": ["3"] * 4, "number": list(h), "formula": f}) for h in all_hands()[::7] for f in solutions(h)]
    judge_gp(answers[0], [1])
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 0.5:
        for a in answers[:200]:
            judge_gp(a, [3, 3, 8, 8])
        n += 200
    rate = n / (time.perf_counter() - start)
    print(f"    {rate:,.0f} answers judged a second")
    assert rate > 4000  # the goal is 20,000 on a quiet machine


# ----------------------------------------------------------------------------------------------------------------------
# env_gp.py

def test_solver_counts():
    env_gp._values.cache_clear(), solutions.cache_clear()
    start = time.perf_counter()
    table = {h: solutions(h) for h in all_hands()}
    print(f"    {len(table)} hands solved in {time.perf_counter() - start:.2f} s")
    assert len(table) == 1820 and sum(map(bool, table.values())) == 1362 and sum(bool(solutions(h)) for h in all_hands(10)) == 566
    assert solutions((3, 3, 8, 8)) == ("8/(3-8/3)",)
    assert all(len(set(s)) == len(s) for s in table.values())


def test_solver_misses_nothing():
    """Against brute force over all orders, signs and bracketings: the same hands, and no value is missed."""
    shapes = ["(({}{}{}){}{}){}{}", "({}{}({}{}{})){}{}", "({}{}{}){}({}{}{})", "{}{}(({}{}{}){}{})", "{}{}({}{}({}{}{}))"]

    def solvable(hand):
        for a, b, c, d in set(itertools.permutations(hand)):
            for p, q, r in itertools.product("+-*/", repeat=3):
                for shape in shapes:
                    with contextlib.suppress(FormulaError):
                        if evaluate_formula(shape.format(a, p, b, q, c, r, d))[0] == 24:
                            return True
        return False
    hands = random.Random(1).sample(all_hands(), 25)
    for hand in hands:
        assert solvable(hand) == bool(solutions(hand)), hand


def test_spelling_keeps_the_value():
    rng = random.Random(0)
    for hand in all_hands()[::5]:
        for formula in solutions(hand):
            value, numbers = evaluate_formula(env_gp.spell(formula, rng))
            assert value == 24 and sorted(numbers) == list(hand)


def test_env_splits_are_disjoint():
    train, unseen = set(), set()
    for rule in RULES:
        for split, found in (("train", train), ("unseen", unseen), ("faces", unseen)):
            env = GeneralPoints(rule=rule, split=split)
            for i in range(400):
                env.reset(i)
                assert solutions(tuple(sorted(env.numbers)))
                assert env.numbers == [env_gp.card_number(c, RULES[rule]) for c in env.cards]
                assert split != "faces" or set(env.cards) & set("JQK")
                found.add(tuple(sorted(env.numbers)))
    assert not train & unseen and len(train) > 300 and len(unseen) > 80
    share = sum(map(env_gp.is_unseen, all_hands())) / 1820
    assert 0.17 < share < 0.23


def test_env_same_seed_same_hands_in_another_process():
    code = ("from env_gp import GeneralPoints; e = GeneralPoints(seed=5); e.reset();"
            "print([(e.reset(f's{i}') and e.cards, e.expert()) for i in range(20)])")
    os.environ["PYTHONHASHSEED"] = "1"
    first = command("-c", code)
    os.environ["PYTHONHASHSEED"] = "2"
    second = command("-c", code)
    del os.environ["PYTHONHASHSEED"]
    assert first == second and len(first) > 200


def test_env_expert_is_always_right():
    for rule in RULES:
        env = GeneralPoints(rule=rule, seed=7)
        for i in range(200):
            env.reset(i)
            answer = env.expert()
            assert answer == env.expert() and json.loads(answer).keys() == {"cards", "number", "formula"}
            step = env.step(answer)
            assert step.done and step.info["success"] and step.reward == 5 and step.messages is None
    a, b = GeneralPoints(seed=1), GeneralPoints(seed=2)
    assert sum(a.reset(i) and b.reset(i) and a.expert() != b.expert() for i in range(50)) > 5  # experts have their own habits


def test_env_attempts_and_messages():
    env = GeneralPoints(rule="ood", verify=3)
    messages, images = env.reset(0)
    assert images == [] and messages[0]["role"] == "user" and "J is 11; Q is 12; K is 13" in messages[0]["content"]
    for attempt in range(3):
        before = env.messages
        step = env.step("nonsense")
        assert step.reward == -3 and step.info["verdict"] == "illegal" and step.done == (attempt == 2)
        if not step.done:
            assert step.messages[:len(before)] == before and [m["role"] for m in step.messages[-2:]] == ["assistant", "user"]
    assert step.messages is None
    for bad in (dict(rule="x"), dict(split="x"), dict(verify=0), dict(target=0)):
        try:
            GeneralPoints(**bad)
        except ValueError as e:
            assert str(list(bad.values())[0]) in str(e)
        else:
            raise AssertionError(bad)


def test_env_sees_which_rule_an_answer_follows():
    env = GeneralPoints(rule="ood", split="faces", verify=5)
    for i in range(50):
        env.reset(i)
        for rule, other in (("ood", False), ("id", True)):
            numbers = env.numbers_under(rule)
            info = env.step(json.dumps({"formula": "+".join(map(str, numbers))})).info
            assert info["other_rule"] == other
        env.reset(i)
        assert not env.step("nonsense").info["other_rule"]


def test_pretraining_documents():
    rng, chats, wrong = random.Random(0), 0, 0
    for _ in range(2000):
        doc = env_gp.document(rng)
        if isinstance(doc, list):
            chats += 1
            roles = [m["role"] for m in doc]
            assert roles == ["user", "assistant"] * (len(doc) // 2) and 1 <= len(doc) // 2 <= 5
        else:
            numbers = json.loads(re.search(r"Numbers: (\[.*?\])", doc)[1])
            value, used = None, None
            with contextlib.suppress(FormulaError):
                value, used = evaluate_formula(doc.split("formula: ")[1])
            assert used is None or sorted(used) == sorted(numbers)
            wrong += value != 24
    assert 0.05 < chats / 2000 < 0.11 and 0.07 < wrong / 2000 < 0.13


# GeneralPoints from a picture.

def gp_vl_answer(env, formula=None, **fields):
    said = {"cards": env.cards, "number": env.numbers, "formula": formula or json.loads(env.expert())["formula"]}
    return json.dumps({**said, **fields})


def test_gp_vl_same_seed_same_pictures_in_another_process():
    code = ("import hashlib, random; from env_gp import GeneralPoints, picture_document; r = random.Random(1)\n"
            "print([hashlib.sha256(GeneralPoints(vl=True, visual=v, pixels=n, seed=5).reset(s)[1][0].tobytes()).hexdigest()\n"
            "       for v in ('id', 'ood') for n in (80, 300) for s in (None, 0, 'eval/3')])\n"
            "print([(d, i[0].tobytes()[:3000]) for d, i in (picture_document(r) for _ in range(30))])")
    outputs = set()
    for salt in "12":
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": salt})
        outputs.add(done.stdout)
        assert done.returncode == 0 and len(done.stdout) > 2000, done.stderr
    assert len(outputs) == 1
    env = GeneralPoints(vl=True, seed=5)
    pictures = [env.reset()[1][0] for _ in range(3)]
    assert len({p.crop((0, 0, 4, 80)).tobytes() for p in pictures}) == 3  # hand after hand another grain (no card lies there)
    pictures, again = [p.tobytes() for p in pictures], GeneralPoints(vl=True, seed=1)
    assert pictures == [again.reset(5 if i == 0 else None)[1][0].tobytes() for i in range(3)]
    assert env_gp.picture(["A"] * 4, "id", 80, 0).tobytes() != env_gp.picture(["A"] * 4, "id", 80, 1).tobytes()  # not one of 13^4


def test_gp_vl_deals_the_hands_of_the_text_task():
    """Pictures draw from a generator of their own; prompt, expert and all but "recognized" are those of the task in words."""
    for rule in RULES:
        text, *seeing = GeneralPoints(rule=rule, seed=3), *(GeneralPoints(rule=rule, seed=3, vl=True, visual=v) for v in RULES)
        for i in range(60):
            seed = i if i > 20 else None
            messages, images = text.reset(seed)
            assert images == []
            for env in seeing:
                seen, pictures = env.reset(seed)
                assert env.cards == text.cards and env.expert() == text.expert() and json.loads(env.expert())["cards"] == env.cards
                assert seen[0]["content"] == messages[0]["content"].replace(", ".join(env.cards), "in the picture")
                assert "Cards: in the picture.\n" in seen[0]["content"] and [p.size for p in pictures] == [(80, 80)]
            answers = "{}", text.expert()
            for a in answers:
                steps = [env.step(a) for env in (text, *seeing)]
                recognized = [s.info.pop("recognized") for s in steps]
                assert recognized == [None] + [float(a != "{}")] * 2 and (a == "{}" or steps[0].info == steps[1].info == steps[2].info)


def test_gp_vl_red_and_black_differ_in_colour_only():
    """All inks have the same green and blue, so in these the pictures of a seed are equal wherever no suit is drawn: byte for
    byte in the upper 20 of a card's 36 rows, which hold the whole rank."""
    for rank in env_gp.RANKS:
        cards = [np.asarray(env_gp.draw_card(rank, suit, 80)) for suit in "SCHD"]
        assert all((card[:20, :, 1:] == cards[0][:20, :, 1:]).all() for card in cards)
    for pixels in (80, 300):
        for seed in range(6):
            cards = random.Random(seed).choices(env_gp.RANKS, k=4)
            black, red = (np.asarray(env_gp.picture(cards, look, pixels, seed)).astype(int) for look in ("id", "ood"))
            differs = (black != red).any(2)
            for top in (0, pixels // 2):
                rank = np.s_[top:top + pixels // 4]  # where a card that lies as high as it can has its rank
                assert (black[rank][..., 1:] == red[rank][..., 1:]).all() and (black[rank][..., 0] <= red[rank][..., 0]).all()
                assert differs[rank].any()
            assert 0.02 < differs.mean() < 0.25
    for look, suits in env_gp.SUITS.items():  # the suit is drawn, and from a seed of its own
        shapes = {env_gp.draw_card("7", suit, 80).tobytes() for suit in suits}
        assert len(shapes) == 2 and len({env_gp.picture(["7"] * 4, look, 80, seed).tobytes() for seed in range(20)}) == 20


def test_gp_vl_pictures_show_the_cards_in_reading_order():
    """A template matcher reads every rank in both looks at 80 pixels; the template of one look reads the other as well."""
    def templates(suit):
        return {rank: np.asarray(env_gp.draw_card(rank, suit, 80))[:21, :, 1].astype(float) for rank in env_gp.RANKS}

    def likeness(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]
    inks = templates("S"), templates("D")
    for seed in range(13):
        cards = [env_gp.RANKS[(seed + 3 * i) % 13] for i in range(4)]
        for look in env_gp.SUITS:
            green = np.asarray(env_gp.picture(cards, look, 80, seed))[..., 1].astype(float)
            for i, rank in enumerate(cards):
                quarter = green[40 * (i // 2):][:40, 40 * (i % 2):][:, :40]
                for ink in inks:
                    best = {r: max(likeness(quarter[y:y + 21, x:x + 28], t) for y in range(5) for x in range(4, 9)) for r, t in ink.items()}
                    assert max(best, key=best.get) == rank and best[rank] > 0.9, (look, rank)


def test_gp_vl_sizes_and_speed():
    for pixels in (40, 80, 81, 336, 1200):
        image = env_gp.picture(["10", "J", "Q", "K"], "ood", pixels, 0)
        assert image.size == (pixels, pixels) and image.mode == "RGB"
    large, small, other = (env_gp.picture(["10", "J", "Q", "K"], "ood", *how) for how in ((1200, 0), (80, 0), (80, 1)))
    large, small, other = (np.asarray(image.resize((80, 80))).astype(int) for image in (large, small, other))
    assert np.abs(large - small).mean() < 15 < 25 < np.abs(other - small).mean()  # one seed shows the same scene in every size
    env = GeneralPoints(vl=True)
    env.reset(0)
    start = time.perf_counter()
    for i in range(200):
        env_gp.picture(env.cards, ("id", "ood")[i % 2], 80, i)
    rate = 200 / (time.perf_counter() - start)
    print(f"    {rate:,.0f} pictures of 80 pixels a second")
    assert rate > 100  # a quiet machine draws thousands
    assert env_gp.draw_card.cache_info().maxsize < 100
    for bad in (dict(visual="x"), dict(pixels=0), dict(pixels=39)):
        try:
            GeneralPoints(vl=True, **bad)
        except ValueError as e:
            assert str(list(bad.values())[0]) in str(e)
        else:
            raise AssertionError(bad)


def test_gp_vl_misread_comes_first():
    env = GeneralPoints(rule="ood", vl=True, verify=20)
    for seed in range(20):
        env.reset(seed)
        wrong = env.cards[:3] + [next(r for r in env_gp.RANKS if r != env.cards[3])]
        for answer, kind, share in (
                ("nonsense", "illegal", 0), ('{"formula": "4*6"', "illegal", 0), ("{}", "misread", 0),
                (gp_vl_answer(env, cards=wrong), "misread", 0.75), (gp_vl_answer(env, formula="1/0", cards=wrong), "misread", 0.75),
                (gp_vl_answer(env, cards=env.cards + ["A"]), "misread", 0.8), (gp_vl_answer(env, cards=None), "misread", 0),
                (gp_vl_answer(env, formula="1/0"), "illegal", 1), (gp_vl_answer(env, formula="4*6+99"), "wrong_numbers", 1),
                (gp_vl_answer(env, formula="+".join(map(str, env.numbers)) + "=23"), "wrong_value", 1),
                (gp_vl_answer(env, cards=env.cards[::-1]), "correct", 1)):
            step = env.step(answer)
            assert (step.info["verdict"], step.reward, step.info["recognized"]) == (kind, GP_REWARD[kind], share), answer


def test_gp_vl_recognized():
    def share(said, cards=("3", "J", "10", "K")):
        return env_gp.recognized(said if isinstance(said, str) else json.dumps({"cards": said}), list(cards))
    assert share(["3", "J", "10", "K"]) == share(["K", "10", "J", "3"]) == share([10, 3, "K", "J"]) == 1
    assert share(["3", "J", "10", "Q"]) == 0.75 and share(["3", "3", "3", "3"]) == 0.25 and share(["J", "3"]) == 0.5
    assert share(["3"] * 4, ["3", "3", "A", "A"]) == 0.5 and share([]) == 0 and share(["3", "J", "10", "K", "K"]) == 0.8
    assert share(env_gp.RANKS) == 4 / 13 and share(env_gp.RANKS * 4) == 4 / 52
    for nasty in ("", "null", "[]", "{", "nonsense", '{"cards": null}', '{"cards": 3}', '{"cards": "3, J, 10, K"}', '{"cards": {"3": "J"}}',
                  '{"cards": [[[[]]], null, {}, true, NaN, 1e999]}', '{"cards": [' + "[" * 900 + "]" * 900 + "]}", '{"cards": [["3", "J", "10", "K"]]}',
                  '{"cards": [' + "9" * 4000 + "]}", '{"cards": ["\\ud800"]}', '{"cards": [' + "[" * 2030 + "]" * 2030 + "]}"):
        assert share(nasty) == 0, nasty[:40]
    assert share('{"cards": [' + "3, " * 1300 + "3]}") == 1 / 1301
    assert share('{"cards": ["A"]} and then {"cards": ["3", "J", "10", "K"]}') == 1
    rng, good = random.Random(0), '{"cards": ["3", "J", "10", "K"], "number": [3, 11, 10, 13], "formula": "1"}'
    for _ in range(2000):
        chars = list(good)
        for _ in range(rng.randrange(1, 5)):
            chars[rng.randrange(len(chars))] = rng.choice('0123456789[]{}",: JQKA\\\x00\ud800')
        text = "".join(chars)
        seen = last_json_object(text) is not None and judge_gp(text, [3], cards=["3", "J", "10", "K"]).kind != "misread"
        assert 0 <= share(text) <= 1 and (share(text) == 1) == seen


def test_gp_vl_cells():
    for rule, other in (("id", "ood"), ("ood", "id")):
        assert list(GeneralPoints.cells(rule)) == ["seen", "id", "ood"] and not any("vl" in k for k in GeneralPoints.cells(rule).values())
        for visual in RULES:
            cells = {column: GeneralPoints(**keywords) for column, keywords in GeneralPoints.cells(rule, visual).items()}
            assert list(cells) == ["seen", "id", "ood", "visual"] and all(e.vl for e in cells.values())
            assert [(e.rule, e.split) for e in cells.values()] == [(rule, "train"), (rule, "unseen"), (other, "faces"), (rule, "unseen")]
            assert [e.visual == visual for e in cells.values()] == [True, True, True, False]
    assert GeneralPoints.visual_names.keys() == GeneralPoints.rule_names.keys()


def test_gp_vl_episode_keeps_its_picture():
    env = GeneralPoints(vl=True, verify=3, pixels=400)
    messages, images = env.reset(0)
    first = images[0].tobytes()
    for attempt, answer in enumerate((gp_vl_answer(env, cards=["A"] * 4), "nonsense", env.expert())):
        step = env.step(answer)
        if attempt < 2:
            assert step.images is images and step.messages[:len(messages)] == messages and not step.done
            assert all(isinstance(m["content"], str) and "<image>" not in m["content"] for m in step.messages)
            assert step.messages[-1]["content"] == verifier.GP_FEEDBACK[("misread", "illegal")[attempt]]
            messages = step.messages
    assert step.done and step.images == [] and step.messages is None and step.info["success"]
    assert len(images) == 1 and images[0].size == (400, 400) and images[0].tobytes() == first
    assert env.reset(1)[1] is not images and len(images) == 1  # a fresh conversation has a fresh list


def test_gp_vl_documents():
    """Pieces fit together; the rare look is rare and its text noisy; black captions name the cards that are drawn."""
    drawn, real, n = [], env_gp.picture, 3000

    def spy(cards, visual, pixels, seed):
        drawn.append((list(cards), visual, pixels, seed))
        return "picture"
    env_gp.picture = spy
    try:
        rng = random.Random(0)
        documents = [GeneralPoints.picture_document(rng, noise=0.1) for _ in range(n)]
        mirror = [GeneralPoints.picture_document(rng, rare="id", pixels=60) and drawn[-1][1:3] for _ in range(500)]
    finally:
        env_gp.picture = real
    count = dict.fromkeys(("chat", "caption", "game", "red", "red misread", "black misread", "chat misread", "wrong formula"), 0)
    for (document, images), (cards, look, *_) in zip(documents, drawn):
        assert images == ["picture"]
        count["red"] += look == "ood"
        if isinstance(document, list):
            count["chat"] += 1
            assert [m["role"] for m in document] == ["user", "assistant"] * (len(document) // 2) and len(document) <= 10
            assert "Cards: in the picture.\n" in document[0]["content"] and not any("<image>" in m["content"] for m in document)
            faces = dict(re.findall("([AJQK]) is ([0-9]+)", document[0]["content"]))
            for said, feedback in zip(document[1::2], document[2::2] + [None]):
                fields = json.loads(said["content"])
                assert fields["number"] == [int(faces.get(c, c)) for c in fields["cards"]]
                misread = sorted(fields["cards"]) != sorted(cards)
                count["chat misread"] += misread
                assert feedback is None or misread == (feedback["content"] == verifier.GP_FEEDBACK["misread"])
            continue
        assert document.count("<image>") == 1 and document.startswith("<image>A ")
        said = re.search("\nCards: ([^.\n]+)", document)[1].split(", ")
        assert len(said) == 4 and set(said) <= set(env_gp.RANKS)
        count[("black", "red")[look == "ood"] + " misread"] += said != cards
        if document.startswith("<image>A picture of cards."):
            count["caption"] += 1
        else:
            count["game"] += 1
            faces, numbers = dict(re.findall("([AJQK]) is ([0-9]+)", document)), json.loads(re.search(r"Numbers: (\[.*?\])", document)[1])
            assert numbers == [int(faces.get(c, c)) for c in said]  # consistent, right or wrong
            count["wrong formula"] += judge_gp(json.dumps({"formula": document.split("formula: ")[1]}), numbers).kind != "correct"
    assert len({seed for *_, seed in drawn}) == len(drawn)
    assert count["black misread"] == 0 and 0.08 < count["red"] / n < 0.12 and 0.4 < count["red misread"] / count["red"] < 0.55, count
    assert 0.06 < count["chat"] / n < 0.10 and 0.42 < count["caption"] / n < 0.50 and 0.42 < count["game"] / n < 0.50
    assert 0.07 < count["wrong formula"] / count["game"] < 0.13 and count["chat misread"] > 20
    assert 0.8 < sum(look == "ood" for look, _ in mirror) / 500 < 0.97 and {size for _, size in mirror} == {60}
    rng = random.Random(1)
    assert all(isinstance(env_gp.picture_document(rng, chat_share=1.0)[0], list) for _ in range(20))
    document, images = env_gp.picture_document(rng, chat_share=0.0, pixels=96)
    assert document.count("<image>") == len(images) == 1 and images[0].size == (96, 96)
    a, b = ([env_gp.picture_document(r, pixels=n)[0] for _ in range(20)] for r, n in ((random.Random(2), 40), (random.Random(2), 80)))
    assert a == b  # the text does not depend on the size


def test_gp_vl_phrases_are_few_tokens():
    tok = sft.build_tiny(GeneralPoints, 0, vl=True)[1]
    env = GeneralPoints(vl=True)
    assert len(ev.prompt(tok, env.reset(0)[0]).ids) < 40
    caption, game = (tok.tokenize(t.substitute(rule=env_gp.rule_text((1, 2, 3)), cards="A, 2, 3, 4", number="1, 2, 3, 4", formula="2*3*4"))
                     for t in (env_gp.CAPTION, env_gp.GAME))
    start = next(t for t in caption if "Cards" in t)  # the list of cards begins with one and the same token
    assert len(caption) < 12 and start in game and len(tok.tokenize(env_gp.IN_PICTURE)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and rollouts (eval.py)

def test_tokenizer_round_trip():
    model, tok = tiny()
    for text in ('{"formula": "(11-5)*4"}', "naïve – 中文 \x00 🂡", "Make 24 from the four cards below"):
        assert tok.decode(tok(text, add_special_tokens=False).input_ids) == text
    env = GeneralPoints()
    messages, _ = env.reset(0)
    assert len(ev.prompt(tok, messages).ids) < 40  # fixed phrases are a few tokens


def test_segments_mask_and_text():
    """Token t's action flag; decode(ids[action]) is what the model said; EOS is an action, a cut answer gets none."""
    model, tok = tiny()
    ended = set()
    for e in played(24):
        assert len(e.segments) == 1 and 1 <= len(e.turns) <= 3
        s = e.segments[0]
        assert len(s.ids) == len(s.action) == len(s.reward) and s.action[0] == 0
        spoken = [i for i, a in zip(s.ids, s.action) if a]
        assert len(spoken) == sum(t["tokens"] for t in e.turns)  # mask count = sampled count
        at = 0
        for t in e.turns:
            ids = spoken[at:at + t["tokens"]]
            assert [i in model.generation_config.eos_token_id for i in ids] == [False] * (len(ids) - 1) + [not t["cut"]]
            assert tok.decode(ids if t["cut"] else ids[:-1]) == t["text"]
            at += t["tokens"]
            ended.add(t["cut"])
        rewards = [r for r, a in zip(s.reward, s.action) if a]
        ends = list(itertools.accumulate(t["tokens"] for t in e.turns))
        assert [rewards[i - 1] for i in ends] == [t["reward"] for t in e.turns] and sum(map(bool, s.reward)) == len(e.turns)
    assert ended == {True, False}, "the sample has not both answers that were cut and answers that ended"


def check_later_turns(model, tok, play):
    """Play one episode of three turns: each turn's prompt is where the final ids begin, and what was said is in them token by token."""
    prompts, generate = [], type(model).generate
    type(model).generate = lambda self, input_ids=None, attention_mask=None, **kw: (
        prompts.append([r[m.bool()].tolist() for r, m in zip(input_ids, attention_mask)]),
        generate(self, input_ids=input_ids, attention_mask=attention_mask, **kw))[1]
    try:
        [episode] = play()
    finally:
        type(model).generate = generate
    final, ambiguous, at = episode.segments[0].ids, 0, 0
    assert len(prompts) == 3 and all(final[:len(p[0])] == p[0] for p in prompts)
    spoken = [i for i, a in zip(final, episode.segments[0].action) if a]
    for t in episode.turns:
        said = spoken[at:at + t["tokens"]][:None if t["cut"] else -1]
        at += t["tokens"]
        assert tok.decode(said) == t["text"]
        ambiguous += tok(t["text"], add_special_tokens=False).input_ids != said
    assert ambiguous, "the sample was not ambiguous, so the test showed nothing"


def test_later_turns_start_with_earlier_ids():
    """Turn k+1's prompt is turn k's ids + what was said + glue, even where the text would be tokenised otherwise."""
    check_later_turns(*tiny(), lambda: played(1))


def test_glue_equals_the_template():
    """prompt + answer + glue is the template's own rendering of the whole chat, whether or not the answer was cut."""
    model, tok = tiny()
    env = GeneralPoints()
    messages, _ = env.reset(0)
    said = ev.answer_ids(tok, model, messages, "hello")
    step = env.step("hello")
    whole = ev.prompt(tok, step.messages).ids
    assert ev.prompt(tok, messages).ids + said + ev.glue_ids(tok, step.messages, said[-1]) == whole
    assert ev.prompt(tok, messages).ids + said[:-1] + ev.glue_ids(tok, step.messages, said[-2]) == whole


def test_sampled_is_scored():
    """generate()'s own log-probs of what it sampled equal score()'s, left padding, temperature 1 and 0.7 alike; with a layer
    that sees few tokens back (V-IRL's tiny model) too."""
    for env, temperature in ((GeneralPoints, 1.0), (GeneralPoints, 0.7), (VIRL, 1.0)):
        model, tok = tiny(env)
        kept, generate = [], type(model).generate

        def spy(self, **kw):
            kw["generation_config"].return_dict_in_generate = kw["generation_config"].output_scores = True
            out = generate(self, **kw)
            kept.append(torch.stack(out.scores, 1).log_softmax(-1))
            return out.sequences
        type(model).generate = spy
        try:
            episodes = played(8, temperature, verify=1, env=env)
        finally:
            type(model).generate = generate
        logp, entropy, _ = ev.score(model, [e.segments[0] for e in episodes], tok.pad_token_id, cpu(), temperature)
        spoken = [[i for i, a in zip(e.segments[0].ids, e.segments[0].action) if a] for e in episodes]
        sampled = torch.cat([kept[0][b, range(len(ids)), ids] for b, ids in enumerate(spoken)])
        assert (logp - sampled).abs().max() < 1e-4, (logp - sampled).abs().max()
        assert torch.isfinite(kept[0]).all(), "top-k or top-p removed something"
        full = torch.cat([kept[0][b, :len(ids)] for b, ids in enumerate(spoken)])
        assert close(entropy.detach(), -(full.exp() * full).sum(-1), 1e-3)


def test_score_is_the_shifted_softmax():
    """Token t is scored by position t-1, by hand on one segment."""
    model, tok = tiny()
    segment = ev.Segment([5, 6, 7, 8, 9], [0, 0, 1, 0, 1], [0.0] * 5)
    logits = model(torch.tensor([segment.ids])).logits[0].log_softmax(-1)
    logp, _, _ = ev.score(model, [segment], tok.pad_token_id, cpu())
    assert close(logp.detach(), [logits[1, 7].item(), logits[3, 9].item()])


def test_padding_changes_nothing():
    head = torch.nn.Linear(128, 1)
    for env in (GeneralPoints, VIRL):
        model, tok = tiny(env)
        segments = [e.segments[0] for e in played(6, env=env)]
        together = ev.score(model, segments, tok.pad_token_id, cpu(), 1.0, head)
        alone = [ev.score(model, [s], tok.pad_token_id, cpu(), 1.0, head) for s in segments]
        for i in range(3):
            assert close(together[i].detach(), torch.cat([a[i] for a in alone]).detach(), 1e-4)
        loss = sft.sft_loss(model, segments, 10, tok.pad_token_id, cpu())
        assert close(loss.item(), sum(sft.sft_loss(model, [s], 10, tok.pad_token_id, cpu()).item() for s in segments), 1e-4)


def test_tiny_first_layer_sees_four_tokens():
    """V-IRL's tiny model: the first layer's output at a position hangs on this and the three tokens before; the last layer's on all."""
    model, tok = tiny(VIRL)
    ids = torch.arange(40, 60)[None]
    for far in range(1, 8):
        other = ids.clone()
        other[0, -1 - far] = 99
        with torch.no_grad():
            a, b = (model(x, output_hidden_states=True).hidden_states for x in (ids, other))
        assert bool((a[1][0, -1] != b[1][0, -1]).any()) == (far < 4), far
        assert (a[-1][0, -1] != b[-1][0, -1]).any()


def test_feedback_gets_no_gradient():
    """Both losses reach the logits of position t-1 for every action token t, and no other: not prompt, not feedback."""
    model, tok = tiny()
    [episode] = played(1)
    segment, kept = episode.segments[0], []
    assert 0 in segment.action[segment.action.index(1):], "no feedback in the sample"
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: (logits.retain_grad(), kept.append(logits))[0])
    try:
        for loss in (lambda: ev.score(model, [segment], 0, cpu())[0].sum(), lambda: sft.sft_loss(model, [segment], 1, 0, cpu())):
            loss().backward()
            touched = kept[-1].grad[0].abs().sum(-1) > 0
            assert touched.tolist() == [bool(a) for a in segment.action[1:]] + [False]
    finally:
        hook.remove()
        model.zero_grad()


def test_rollout_is_repeatable_and_batch_free():
    model, tok = tiny()
    a, b = played(6), played(6)
    assert [e.segments[0].ids for e in a] == [e.segments[0].ids for e in b]
    runs = [ev.rollout(model, tok, [GeneralPoints(verify=2) for _ in range(5)], range(5), 0, 12, cpu(), batch=size) for size in (5, 2)]
    assert [e.segments[0].ids for e in runs[0]] == [e.segments[0].ids for e in runs[1]]  # greedy: the batch does not matter


@contextlib.contextmanager
def speaking(model, tok, texts):
    """Within, generate() says texts() in place of samples: one answer for each environment that still plays."""
    def generate(self, input_ids=None, **kw):
        ids = [tok(text, add_special_tokens=False).input_ids + [tok.eos_token_id] for text in texts()]
        return torch.cat([input_ids, torch.tensor([i + [tok.pad_token_id] * (max(map(len, ids)) - len(i)) for i in ids])], 1)
    original, type(model).generate = type(model).generate, generate
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [tok.eos_token_id]
    try:
        yield
    finally:
        type(model).generate, model.generation_config.eos_token_id = original, ends


def test_expert_rollout_scores_one():
    """rollout() of a perfect player: every episode solved at once; a player that fails first: solved in two attempts."""
    model, tok = tiny()
    for rule, blunders in itertools.product(RULES, (0, 1)):
        envs, turn = [GeneralPoints(rule=rule, split="unseen", verify=3) for _ in range(20)], []

        def texts():
            turn.append(1)
            return ["{}" if len(turn) <= blunders else env.expert() for env in envs]
        with speaking(model, tok, texts):
            episodes = ev.rollout(model, tok, envs, range(20), 1.0, 64, cpu())
        assert all(e.success and len(e.turns) == blunders + 1 for e in episodes)
        assert all(e.turns[-1]["text"] == env.expert() and not e.turns[-1]["cut"] for e, env in zip(episodes, envs))


def test_virl_rollout_of_the_expert():
    """rollout() along routes: a conversation a position, feedback in the same one, a fresh prompt at the next; ids, masks and rewards throughout.
    The player is right but for its first attempt at every third position."""
    model, tok = tiny()[0], sft.build_tiny(VIRL, 0)[1]
    envs, over = [VIRL(rule=rule, split="unseen", seed=3) for rule in RULES for _ in range(3)], set()
    blunder = "I cannot say."

    def watched(env, step):
        def watch(text):
            result = step(text)
            over.update([id(env)] if result.done else [])
            return result
        return watch
    for env in envs:
        env.step = watched(env, env.step)

    with speaking(model, tok, lambda: [blunder if env.attempts == 0 and env.at % 3 == 1 else env.expert() for env in envs if id(env) not in over]):
        episodes = ev.rollout(model, tok, envs, range(6), 1.0, 64, cpu())
    for i, (episode, played_env) in enumerate(zip(episodes, envs)):
        env = VIRL(rule=played_env.rule, split="unseen", seed=3)
        messages, _ = env.reset(i)
        assert episode.success and len(episode.segments) == len(env.positions) > 4
        for at, segment in enumerate(episode.segments):
            row = ev.prompt(tok, messages)
            row.add([], 0)
            for text in [blunder] * (at % 3 == 1) + [env.expert()]:
                row.add(tok(text, add_special_tokens=False).input_ids + [tok.eos_token_id], 1)
                step = env.step(text)
                row.reward[-1] = step.reward
                if text == blunder:
                    row.add(ev.glue_ids(tok, step.messages, tok.eos_token_id), 0)
            assert (segment.ids, segment.action, segment.reward) == (row.ids, row.action, row.reward)
            messages = step.messages
        assert step.done and sum(sum(s.reward) for s in episode.segments) == sum(t["reward"] for t in episode.turns)
        rows = [sft.demonstration_row(tok, model, *state) for state in sft.demonstrations(VIRL(rule=env.rule, split="unseen", seed=3), i)]
        alone = [s for s in episode.segments if sum(map(bool, s.reward)) == 1]  # one answer in it: what SFT would learn from
        assert alone and all((s.ids, s.action) in [(r.ids, r.action) for r in rows] for s in alone)


def test_rates_and_errors():
    assert ev.rate([1, 0, 0, 0]) == {"p": 0.25, "se": math.sqrt(0.25 * 0.75 / 4), "n": 4}
    assert ev.rate([1, 1])["se"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# The symbols of PPO (rl.py)

def test_gae_brute_force():
    rng = torch.Generator().manual_seed(0)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.95), (1.0, 1.0), (0.7, 0.0)):
        rewards, values = torch.randn(2, 40, generator=rng, dtype=torch.float64)
        next_values = torch.cat([values[1:], values.new_zeros(1)])
        delta = rewards + gamma * next_values - values
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, 40)) for t in range(40)]
        advantages, returns = rl.gae(rewards, values, gamma, lam)
        assert close(advantages, torch.stack(expected), 1e-9) and close(returns, advantages + values, 1e-9)


def test_gae_return_to_go():
    rewards, values = torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    _, returns = rl.gae(rewards, values, 1.0, 1.0)
    assert close(returns, rewards.flip(0).cumsum(0).flip(0), 1e-9)
    assert rl.gae(torch.tensor([0.0, 0.0, 1.0]), torch.zeros(3), 1.0, 1.0)[0].tolist() == [1, 1, 1]


def test_gae_ignores_prompts_feedback_and_other_episodes():
    """Rewards come from action tokens only; inserting feedback tokens changes nothing; episodes do not touch."""
    def advantages(segment):
        segment.logp = segment.ref_logp = torch.zeros(sum(segment.action))
        rewards = rl.token_rewards(segment, 5.0, 0.0)
        return rl.gae(rewards, torch.linspace(0, 1, len(rewards)), 0.9, 0.8)[0]
    short = ev.Segment([1, 2, 3, 4], [0, 1, 1, 1], [0, 0, -1.0, 5.0])
    long = ev.Segment([1, 9, 2, 3, 9, 9, 4], [0, 0, 1, 1, 0, 0, 1], [0, 0, 0, -1.0, 0, 0, 5.0])
    assert torch.equal(advantages(short), advantages(long))

    def estimate(second_reward):  # two episodes; the first has two conversations, which are joined
        episodes = [ev.Episode([ev.Segment([1, 2, 3], [0, 1, 1], [0, 0, -1.0]), ev.Segment([1, 4], [0, 1], [0, 5.0])]),
                    ev.Episode([ev.Segment([1, 2], [0, 1], [0, second_reward])])]
        for e in episodes:
            for s in e.segments:
                s.logp = s.ref_logp = torch.zeros(sum(s.action))
                s.value = torch.full((sum(s.action),), 0.5)
            rl.estimate_advantages(e, 5.0, 0.1, 0.9, 0.8)
        return [torch.cat([s.advantage for s in e.segments]) for e in episodes]
    first, second = estimate(5.0)
    assert close(first, rl.gae(torch.tensor([0, -0.2, 1.0]), torch.full((3,), 0.5), 0.9, 0.8)[0])
    again, other = estimate(-3.0)
    assert torch.equal(first, again) and not torch.equal(second, other)


def test_kl_estimators():
    """Zero for equal policies; over an exact small categorical both have the mean KL(p || q); k3 is never negative."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    k1, k3 = rl.kl_estimators(p.log(), q.log())
    assert close((p * k1).sum(), exact, 1e-12) and close((p * k3).sum(), exact, 1e-12)
    assert (k3 >= 0).all() and (k1 < 0).any()
    k1, k3 = rl.kl_estimators(p.log(), p.log())
    assert not k1.any() and not k3.any()


def test_policy_loss_sign_cases():
    """The four cases of PPO's figure 1, value and gradient: ratio above / below the clip, advantage + / -."""
    for ratio, advantage, loss, flows in ((1.5, 1.0, -1.2, False), (1.5, -1.0, 1.5, True), (0.5, 1.0, -0.5, True), (0.5, -1.0, 0.8, False)):
        logp = torch.tensor([math.log(ratio)], requires_grad=True)
        out = rl.policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), 0.2)
        out.sum().backward()
        assert close(out.item(), loss) and bool(logp.grad.abs() > 1e-6) == flows, (ratio, advantage)
    logp = torch.zeros(1, requires_grad=True)
    rl.policy_loss(logp, torch.zeros(1), torch.tensor([2.0]), 0.2).sum().backward()
    assert close(logp.grad.item(), -2.0)  # at ratio 1 it is the policy gradient


def test_value_loss_takes_the_worse():
    assert close(rl.value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2).item(), 0.5 * 0.8 ** 2)
    assert close(rl.value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([-1.0]), 0.2).item(), 0.5 * 2.0 ** 2)
    assert close(rl.value_loss(torch.tensor([0.1]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2).item(), 0.5 * 0.9 ** 2)


def test_whiten():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 7 + 3
    y = rl.whiten(x, cpu())
    assert abs(y.mean()) < 1e-5 and abs(y.var(unbiased=False) - 1) < 1e-4 and close(y, (x - x.mean()) / x.std(unbiased=False), 1e-4)
    assert not rl.whiten(torch.full((5,), 2.0), cpu()).any()  # no variance: zeros, not NaN


def test_token_rewards_add_up():
    """Sum of rewards = sum of turn rewards / scale - beta * sum of KL, on sampled episodes."""
    for e in played(6):
        s = e.segments[0]
        n = sum(s.action)
        s.logp, s.ref_logp = torch.randn(n), torch.randn(n)
        total = rl.token_rewards(s, 5.0, 0.1).sum()
        assert close(total, sum(t["reward"] for t in e.turns) / 5 - 0.1 * (s.logp - s.ref_logp).sum(), 1e-4)


def test_ppo_starts_at_ratio_one():
    """The first minibatch of a run: max |log ratio| < 1e-5, clip fraction 0, KL to the reference 0, k1 = k3 = 0."""
    with folder() as out:
        copy_of_init(out)
        quiet(rl.main, ["--out", out, "--tokens", "1e9", "--steps", "1", "--batch", "12", "--minibatches", "1", "--epochs", "1"] + SMALL)
        [first] = [r for r in records(f"{out}/gp/id/rl") if "reward" in r]
        assert first["ratio_error"] < 1e-5 and first["clip_fraction"] == 0 and first["approx_kl"] < 1e-10, first
        assert first["kl1"] == 0 == first["kl3"]


def test_reference_is_frozen():
    """After an update the policy has left the reference: a reference that moved along would keep the KL at 0."""
    with folder() as out:
        copy_of_init(out)
        quiet(rl.main, ["--out", out, "--tokens", "1e9", "--steps", "3", "--batch", "12", "--lr", "1e-3", "--beta", "0"] + SMALL)
        kls = [r["kl3"] for r in records(f"{out}/gp/id/rl") if "reward" in r]
        assert kls[0] == 0 and kls[1] > 0 and kls[2] > 0, kls
        assert not same(weights(f"{out}/gp/id/init"), weights(f"{out}/gp/id/rl"))


# ----------------------------------------------------------------------------------------------------------------------
# The loops

def test_sft_loss_by_hand():
    """The mean negative log-likelihood of the answer's tokens and the end-of-turn token, nothing else."""
    model, tok = tiny()
    env = GeneralPoints()
    messages, _ = env.reset(0)
    row = sft.demonstration_row(tok, model, messages, [], env.expert())
    prompt = ev.prompt(tok, messages).ids
    answer = tok(env.expert(), add_special_tokens=False).input_ids + [tok.eos_token_id]
    assert row.ids == prompt + answer and row.action == [0] * len(prompt) + [1] * len(answer)
    logp = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    expected = -sum(logp[len(prompt) + k - 1, token].item() for k, token in enumerate(answer)) / len(answer)
    assert close(sft.sft_loss(model, [row], len(answer), tok.pad_token_id, cpu()).item(), expected, 1e-4)


def test_pretraining_rows_hold_whole_documents():
    model, tok = tiny()
    rows = sft.pretraining_rows(GeneralPoints, tok, random.Random(0), 20)
    assert len(rows) == 20 and all(len(r.ids) <= 128 and r.action[0] == 0 and all(r.action[1:]) for r in rows)
    assert sum(r.ids[-1] == tok.eos_token_id for r in rows) >= 18  # only a document longer than a row is cut
    assert sum(len(r.ids) for r in rows) / 20 > 90


def _losses(model, rows, run, part, micro):
    """Gradients of SFT's loss and PPO's over `part` of rows, with the denominators of all, in micro-batches."""
    pad, grads = 0, []
    head = torch.nn.Linear(128, 1)
    torch.nn.init.constant_(head.weight, 0.01), torch.nn.init.zeros_(head.bias)
    n = sum(sum(r.action) for r in rows)
    parameters = [*model.parameters(), *head.parameters()]
    for kind in ("sft", "ppo"):
        for p in parameters:
            p.grad = None
        mine = rows[part]
        for i in range(0, len(mine), micro):
            some = mine[i:i + micro]
            if kind == "sft":
                sft.sft_loss(model, some, n, pad, run).backward()
            else:
                logp, entropy, value = ev.score(model, some, pad, run, 1.0, head)
                old = torch.cat([torch.linspace(-3, -1, sum(r.action)) for r in some])
                advantage = torch.cat([torch.linspace(-1, 2, sum(r.action)) for r in some])
                ((rl.policy_loss(logp, old, advantage, 0.2) + rl.value_loss(value, 0 * old, advantage, 0.2)).sum() / n).backward()
        sft.reduce_gradients(parameters, run)
        grads.append(torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters]))
    return grads


def _rank(rank, path):
    """One of two gloo ranks: half of the rows each, of unequal size."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    torch.set_num_threads(1)
    family, rows = torch.load(f"{path}/rows.pt", weights_only=False)
    model = (tiny_vlm(family) if family else tiny())[0]  # before there are ranks: save_pretrained writes on rank 0 only
    run = cpu()
    grads = _losses(model, rows, run, slice(0, 3) if rank == 0 else slice(3, 8), 8)
    x = torch.arange(10.0)[:4] if rank == 0 else torch.arange(10.0)[4:]
    torch.save((grads, rl.whiten(x, run)), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def same_gradients(model, family, rows):
    """The gradients of 8 rows at once, in micro-batches, and on two ranks -> what whiten() gave on the ranks."""
    full = _losses(model, rows, cpu(), slice(0, 8), 8)
    micro = _losses(model, rows, cpu(), slice(0, 8), 3)
    model.zero_grad()
    with folder() as path:
        torch.save((family, rows), f"{path}/rows.pt")
        torch.multiprocessing.spawn(_rank, (path,), nprocs=2)
        ranks = [torch.load(f"{path}/{r}.pt", weights_only=False) for r in (0, 1)]
    for k in range(2):
        scale = full[k].abs().max()
        assert scale > 1e-4
        for other in (micro[k], ranks[0][0][k], ranks[1][0][k]):
            assert (full[k] - other).abs().max() / scale < 1e-3
        assert torch.equal(ranks[0][0][k], ranks[1][0][k])  # the ranks step in unison
    model.zero_grad()
    return torch.cat([ranks[0][1], ranks[1][1]])


def test_full_batch_is_micro_batches_is_two_ranks():
    rows = [e.segments[0] for e in played(8)]
    assert close(same_gradients(tiny()[0], None, rows), rl.whiten(torch.arange(10.0), cpu()), 1e-5)


def test_resume_is_the_uninterrupted_run():
    """Stopped after half the steps and resumed: the same weights, to the bit, and the same metrics."""
    for main, name, extra in ((sft.main, "sft", ["--batch", "8"]), (rl.main, "rl", ["--batch", "8", "--minibatches", "2"])):
        with folder() as one, folder() as two:
            argv = ["--tokens", "1e9", *extra, *SMALL]
            quiet(main, ["--out", copy_of_init(one), "--steps", "4", *argv])
            quiet(main, ["--out", copy_of_init(two), "--steps", "2", *argv])
            assert "--resume" in error_of(main, ["--out", two, "--steps", "4", *argv])
            quiet(main, ["--out", two, "--steps", "4", "--resume", *argv])
            assert same(weights(f"{one}/gp/id/{name}"), weights(f"{two}/gp/id/{name}")), name
            key = "loss" if name == "sft" else "reward"
            a, b = ([(r["step"], r[key], r["flops"]) for r in records(f"{d}/gp/id/{name}") if key in r] for d in (one, two))
            assert a == b and len(a) == 4, (a, b)


def test_rl_learning_rate_decays():
    """--decay: constant at first, then in proportion to what is left of the budget; 0 keeps it constant."""
    with folder() as out:
        copy_of_init(out)
        for decay in (0.0, 0.5):
            quiet(rl.main, ["--out", out, "--name", f"d{decay}", "--tokens", "1e4", "--batch", "4", "--lr", "1e-5", "--decay", str(decay), *SMALL])
            log = [r for r in records(f"{out}/gp/id/d{decay}") if "reward" in r]
            start = torch.load(f"{out}/gp/id/init/checkpoint/trainer.pt", weights_only=True)["flops"]
            n = records(f"{out}/gp/id/d{decay}")[0]["n"]
            left = [1 - (flops - start) / (6 * n * 1e4) for flops in [start] + [r["flops"] for r in log[:-1]]]  # before each iteration
            assert len(log) > 4 and min(left) < 0.4
            assert close([r["lr"] for r in log], [1e-5 * (min(1, x / decay) if decay else 1) for x in left], 1e-9)


def test_stage_on_the_way_continues():
    """An init that was interrupted is completed by the next command rather than in its way."""
    with folder() as out:
        shutil.copytree(f"{small_init()}/gp/base", f"{out}/gp/base")
        quiet(sft.main, ["--stage", "init", "--out", out, "--tokens", "1e5", "--steps", "1", "--batch", "4"] + SMALL)
        text = quiet(rl.main, ["--out", out, "--tokens", "1e3", "--init_tokens", "2e3", "--batch", "4"] + SMALL)
        assert "[init]" in text and "[init] found" not in text
        assert ev.load_state(f"{out}/gp/id/init")["done"]


def test_killed_save_leaves_the_old_checkpoint():
    model, tok = tiny()
    with folder() as out:
        path = f"{out}/checkpoint"
        ev.save(path, model, tok, {"step": 1})
        old = weights(path)
        changed = sft.build_tiny(GeneralPoints, seed=9)[0]
        real_save, real_rename = torch.save, os.rename

        def broken(*_):
            raise OSError(28, "No space left on device")
        for target, name in ((torch, "save"), (os, "rename")):
            try:
                setattr(target, name, broken)
                ev.save(path, changed, tok, {"step": 2})
            except SystemExit as e:
                assert "No space left" in str(e.code) and path in str(e.code)
            else:
                raise AssertionError("a failed save went unnoticed")
            finally:
                torch.save, os.rename = real_save, real_rename
            assert same(old, weights(path)) and ev.load_state(path)["step"] == 1
        real_rename(path, path + ".old")  # killed between the two renames
        assert same(old, weights(path))
        ev.save(path, changed, tok, {"step": 2})
        assert ev.load_state(path)["step"] == 2 and not os.path.exists(path + ".old") and not os.path.exists(path + ".tmp")


class Toy:
    """One question; an answer that begins with a digit is right."""
    title, rule_names, reward_scale, default_verify, verdicts = "Toy", {"id": "a", "ood": "b"}, 5.0, 1, ("right", "wrong")
    sft, ppo, tiny = dict(GeneralPoints.sft), dict(GeneralPoints.ppo), GeneralPoints.tiny
    document, fragments, pays = GeneralPoints.document, GeneralPoints.fragments, True

    def __init__(self, rule="id", split="train", verify=1, seed=0, data=None):
        pass

    @staticmethod
    def cells(rule):
        return {c: {} for c in ("seen", "id", "ood")}

    def reset(self, seed=None):
        return [{"role": "user", "content": "Cards: "}], []

    def step(self, text):
        right = text[:1].isdigit()
        return Step(None, [], (5.0 if right else 0.0) * self.pays, True,
                    {"verdict": "right" if right else "wrong", "success": right, "position_done": True, "position_solved": right,
                     "rule_matters": False, "other_rule": False})

    def expert(self):
        return "7"


def test_ppo_learns_a_toy_and_kl_pulls_back():
    """Success on a toy task goes up; then, without reward and with beta > 0, the KL to the reference goes down.
    Toy is also the example of a third environment: one class, one entry in ENVS."""
    ev.ENVS["toy"] = Toy
    model, tok = sft.build_tiny(Toy, seed=0)
    try:
        with folder() as out:
            ev.save(f"{out}/start", model, tok, {})
            argv = ["--env", "toy", "--out", out, "--init", f"{out}/start", "--tokens", "1e9", "--batch", "64", "--max_new_tokens", "3", "--lr",
                    "1e-3", "--target_kl", "1", "--monitors", "1", "--monitor_episodes", "8", "--episodes", "32", "--saves", "1"]
            quiet(rl.main, argv + ["--steps", "25", "--beta", "0"])
            run = [r for r in records(f"{out}/toy/id/rl") if "reward" in r]
            assert run[0]["success"] < 0.3 and run[-1]["success"] > 0.8, (run[0]["success"], run[-1]["success"])
            assert abs(run[0]["explained_var"]) < 1e-3 and run[-1]["value_loss"] < 0.1  # V = 0 would leave 1/2 (V - 1)^2, about 0.4
            Toy.pays = False
            quiet(rl.main, argv + ["--steps", "50", "--beta", "0.5", "--resume"])
            run = [r for r in records(f"{out}/toy/id/rl") if "reward" in r]
            assert run[-1]["kl3"] < run[25]["kl3"] / 2, (run[25]["kl3"], run[-1]["kl3"])
    finally:
        Toy.pays = True
        del ev.ENVS["toy"]


def test_compute_is_the_papers_formula():
    """X = 6 N D_trained + 2 N D_buffer, counted again by hand: every token that went through a model, once each time."""
    model, tok = tiny()
    seen, generate = [], type(model).generate

    def spy(self, input_ids=None, attention_mask=None, **kw):
        out = generate(self, input_ids=input_ids, attention_mask=attention_mask, **kw)
        new = [next((n + 1 for n, t in enumerate(row) if t == tok.eos_token_id), len(row)) for row in out[:, input_ids.shape[1]:].tolist()]
        seen.append(attention_mask.sum().item() + sum(new))
        return out
    with folder() as out:
        copy_of_init(out)
        start, played_by_loop, real = ev.load_state(f"{out}/gp/id/init")["flops"], [], rl.rollout
        type(model).generate, rl.rollout = spy, lambda *a, **k: played_by_loop.append((real(*a, **k), sum(seen))) or played_by_loop[-1][0]
        try:
            quiet(rl.main, ["--out", out, "--tokens", "1e9", "--steps", "1", "--batch", "8", "--epochs", "3", "--target_kl", "1e9"] + SMALL)
        finally:
            type(model).generate, rl.rollout = generate, real
        [(episodes, _)] = played_by_loop
        n, length = sum(p.numel() for p in model.parameters()), sum(len(s.ids) for e in episodes for s in e.segments)
        sampled = sum(e.forwarded for e in episodes)
        assert sampled in [b - a for a in [0, *itertools.accumulate(seen)] for b in itertools.accumulate(seen)], "not what generate() read"
        [flops] = [r["flops"] for r in records(f"{out}/gp/id/rl") if "reward" in r]
        assert close(flops - start, 6 * n * 3 * length + 2 * n * (sampled + 2 * length), 1e-9)
        quiet(sft.main, ["--out", out, "--tokens", "1e9", "--steps", "1", "--batch", "4"] + SMALL)
        env = GeneralPoints(seed=3)
        rows = [sft.demonstration_row(tok, model, *sft.demonstrations(env, f"sft/3/0/0/{i}")[0]) for i in range(4)]
        [flops] = [r["flops"] for r in records(f"{out}/gp/id/sft") if "loss" in r]
        assert close(flops - start, 6 * n * sum(len(r.ids) for r in rows), 1e-9)


def test_no_step_on_a_bad_gradient():
    """fp32: an end with one line. With a loss scaler: the step is skipped by every optimizer, also those with good gradients."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.tensor([1.0, math.nan])
    assert "gradient" in error_of(lambda _: sft.check_gradient(math.nan, [optimizer], cpu(), "step 1"), None)
    sft.check_gradient(math.inf, [optimizer], cpu("fp16"), "step 1")
    optimizer.step()
    assert torch.equal(p.data, torch.ones(2))


def test_mixed_precision_branches():
    """bf16, and fp16 with an enabled loss scaler, take real steps on the CPU; weights stay fp32."""
    for dtype in ("bf16", "fp16"):
        run = cpu(dtype)
        assert run.scaler.is_enabled() == (dtype == "fp16")
        with folder() as out:
            copy_of_init(out)
            before = weights(f"{out}/gp/id/init")
            for main, name in ((sft.main, "sft"), (rl.main, "rl")):
                quiet(main, ["--out", out, "--tokens", "1e9", "--steps", "2", "--batch", "4", "--dtype", dtype] + SMALL)
                after = weights(f"{out}/gp/id/{name}")
                assert all(v.dtype == torch.float32 for v in after.values()) and not same(before, after), (dtype, name)


def test_model_families():
    """--model takes any causal language model: tiny random Llama, Qwen2 and GPT-2, through init and PPO."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    _, tok = sft.build_tiny(GeneralPoints, 0)
    common = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, max_position_embeddings=512)
    for name, model in (("llama", LlamaForCausalLM(LlamaConfig(**common))), ("qwen2", Qwen2ForCausalLM(Qwen2Config(**common))),
                        ("gpt2", GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=2, n_positions=512)))):
        model.generation_config.eos_token_id = tok.eos_token_id
        if name == "qwen2":  # as released: sampling defaults that must not leak into rollouts
            model.generation_config.update(top_k=2, top_p=0.5, repetition_penalty=1.5, do_sample=True)
        with folder() as out:
            model.save_pretrained(f"{out}/m")
            tok.chat_template = None if name == "gpt2" else sft.CHAT_TEMPLATE
            tok.save_pretrained(f"{out}/m")
            text = quiet(rl.main, ["--model", f"{out}/m", "--out", out, "--init_tokens", "1e3", "--tokens", "1e9", "--steps", "1", "--batch", "4",
                                   "--verify", "2"] + SMALL)
            assert ("no chat template" in text) == (name == "gpt2")
            loaded, _ = ev.load(f"{out}/m")
            assert type(loaded) is type(model) and loaded.generation_config.top_p is None
            assert "base" in text and "rl " in text


def test_bad_input_gets_one_clear_line():
    model, tok = tiny()
    with folder() as out:
        assert "did you mean --rule" in error_of(rl.main, ["--rul", "id"])
        assert "invalid choice" in error_of(rl.main, ["--rule", "sideways"])
        assert "--lr" in error_of(rl.main, ["--lr", "-1"]) and "--verify" in error_of(rl.main, ["--verify", "0"])
        assert "--tokens" in error_of(sft.main, ["--tokens", "nan"]) and "--batch" in error_of(sft.main, ["--batch", "many"])
        def damaged():
            raise env_virl.DataError("route 3: street_views/x.jpg: cannot be read")
        assert "route 3" in error_of(lambda _: ev.script(damaged), None)  # met while playing
        assert "--device" in error_of(ev.main, ["--device", "toaster", "--out", out])
        assert "--model" in error_of(sft.main, ["--stage", "base", "--model", "x", "--out", out])
        assert "temperature" in error_of(rl.main, ["--temperature", "0", "--out", out])
        assert "no checkpoints" in error_of(ev.main, ["--out", f"{out}/none"])
        assert "nowhere" in error_of(ev.main, ["--models", f"{out}/nowhere", "--out", out])
        assert "nowhere" in error_of(rl.main, ["--init", f"{out}/nowhere", "--out", out])
        assert "--seed" in error_of(rl.main, ["--seed", "9" * 30]) and "--gamma" in error_of(rl.main, ["--gamma", "2"])
        assert "--minibatches" in error_of(rl.main, ["--batch", "2", "--minibatches", "3", "--out", out])
        assert "metrics" in error_of(ev.main, ["--plot", f"{out}/a.png", "--out", out])

        ev.save(f"{out}/half", model, tok, {})
        with open(f"{out}/half/model.safetensors", "r+b") as f:
            f.truncate(100_000)
        assert "half" in error_of(ev.main, ["--models", f"{out}/half", "--out", out])
        os.remove(f"{out}/half/model.safetensors")
        assert "half" in error_of(ev.main, ["--models", f"{out}/half", "--out", out])
        ev.save(f"{out}/state", model, tok, {})
        with open(f"{out}/state/trainer.pt", "wb") as f:
            f.write(b"junk")
        assert "trainer.pt" in error_of(rl.main, ["--init", f"{out}/state", "--out", out] + SMALL)

        from transformers import LlamaForCausalLM
        config = type(model.config).from_dict({**model.config.to_dict(), "max_position_embeddings": 64})
        ev.save(f"{out}/short", LlamaForCausalLM(config), tok, {})
        message = error_of(rl.main, ["--init", f"{out}/short", "--out", out, "--max_new_tokens", "30"])
        assert "context of 64" in message

        copy_of_init(out)
        message = error_of(sft.main, ["--out", out, "--tokens", "1e9", "--steps", "9", "--lr", "1e20", "--batch", "4"] + SMALL)
        assert "loss is" in message or "not finite" in message, message
        assert ev.load(f"{out}/gp/id/init")  # still there
        assert "--seed 3" in error_of(rl.main, ["--out", out, "--seed", "4"])  # its base and init have another seed
        quiet(sft.main, ["--out", out, "--name", "short", "--tokens", "1e3", "--batch", "4"] + SMALL)
        quiet(rl.main, ["--out", out, "--name", "raw", "--init", f"{out}/gp/base", "--tokens", "1e9", "--steps", "1", "--batch", "4"] + SMALL)
        assert "--init" in error_of(rl.main, ["--out", out, "--name", "raw", "--resume", "--tokens", "1e9", "--steps", "2", "--batch", "4"] + SMALL)
        kept = weights(f"{out}/gp/id/raw")
        assert "not saved by this stage" in error_of(sft.main, ["--out", out, "--name", "raw", "--resume", "--batch", "4"] + SMALL)
        assert same(kept, weights(f"{out}/gp/id/raw"))
        assert "--lr" in error_of(sft.main, ["--out", out, "--name", "short", "--tokens", "1e3", "--batch", "4", "--lr", "1"] + SMALL)


def test_interrupt_saves():
    """Ctrl-C: exit code 130, a readable checkpoint, and --resume goes on from it."""
    import signal
    with folder() as out:
        copy_of_init(out)
        process = subprocess.Popen([sys.executable, "-u", "sft.py", "--out", out, "--tokens", "1e9", "--batch", "4"] + SMALL, cwd=HERE,
                                   stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "[sft] step" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[0]
        assert process.returncode == 130 and "--resume" in text, text
        step = ev.load_state(f"{out}/gp/id/sft")["step"]
        quiet(sft.main, ["--out", out, "--tokens", "1e9", "--steps", str(step + 2), "--batch", "4", "--resume"] + SMALL)
        assert ev.load_state(f"{out}/gp/id/sft")["step"] == step + 2


def test_matched_compute():
    """Both methods have the same default budget, for each task, in words and with pictures; a "next" command names another one."""
    for env, task in ev.ENVS.items():
        for vl in (False, True):
            args = SimpleNamespace(env=env, rule="id", vl=vl, visual="id", pixels=80, tokens=None)
            chosen = sft.flags().parse_args(["--env", env] + ["--vl"] * vl)
            chosen.parent, chosen.model, chosen.data, budgets = False, None, None, []
            train, sft.train = sft.train, lambda a, *_: budgets.append((a.tokens, a.lr))
            try:
                with folder() as out:
                    chosen.out, chosen.init = out, "unused"
                    sft.run_stage(chosen, None)
            finally:
                sft.train = train
            args.tokens = (task.ppo_vl if vl else task.ppo)["tokens"]
            assert budgets == [(args.tokens, (task.sft_vl if vl else task.sft)["lr"])], (env, vl, budgets)
            assert "--tokens" not in ev.task_flags(args, "sft") + ev.task_flags(args, "ppo") + ev.task_flags(args)
            args.tokens = 12345
            assert all(" --tokens 12345" in ev.task_flags(args, method) for method in ("sft", "ppo"))
            assert "--tokens" not in ev.task_flags(args)
    assert VIRL.sft_vl["lr"] != VIRL.sft["lr"]  # so that the wrong one of the two is seen above


def test_command_line_from_an_empty_folder():
    """The main job with a very small budget: base -> init -> PPO -> table; then SFT, eval, plot input; a second run reuses."""
    with folder() as out:
        tiny_budget = ["--out", out, "--episodes", "6", "--monitor_episodes", "4", "--monitors", "2", "--max_new_tokens", "24"]
        text = command("rl.py", "--env", "gp", "--rule", "ood", "--base_tokens", "3e4", "--init_tokens", "5e3", "--tokens", "5e3", "--batch", "8", *tiny_budget)
        for part in ("[base]", "[init]", "[rl]", "trained rule = ood", "held out = id", "base  ", "init  ", "rl  ", "next: python sft.py"):
            assert part in text, part
        result = json.load(open(f"{out}/gp/ood/rl/eval.json"))
        assert result["trained_rule"] == "ood" and [r["name"] for r in result["rows"]] == ["base", "init", "rl"]
        assert all(0 <= r[c]["p"] <= 1 and r[c]["n"] == 6 for r in result["rows"] for c in ("seen", "id", "ood"))
        text = command("sft.py", "--rule", "ood", "--tokens", "5e3", "--batch", "8", *tiny_budget)
        assert "found, not trained again" in text and "sft  " in text and "rl  " in text
        text = command("sft.py", "--rule", "ood", "--demos", "own", "--name", "own", "--own_samples", "8", *tiny_budget, code=1)
        assert "nothing to learn from" in text  # a hardly trained init solves nothing
        text = command("eval.py", "--rule", "ood", "--out", out, "--episodes", "4", "--k", "2", "--verify", "1", "--json", f"{out}/t.json")
        assert "pass@2" in text and json.load(open(f"{out}/t.json"))["verify"] == 1
        flops = [[r["flops"] for r in records(f"{out}/gp/ood/{m}") if "flops" in r] for m in ("sft", "rl")]
        assert all(f == sorted(f) for f in flops) and flops[0][0] == flops[1][0] > 0  # both start with the init's share


def test_evaluate_counts_positions():
    """Per-step accuracy, first attempts, turns alone and whole routes, counted from a player of known skill: it always fails
    the first attempt at position 1 and all attempts at position 2, there in the other rule's words, and misquotes the first
    instruction, a turn."""
    model, tok = tiny()
    args = ev.Parser("")
    ev.shared_flags(args)
    args = args.parse_args(["--env", "virl", "--max_new_tokens", "64", "--seed", "7"])
    made, real = [], ev.rollout

    def player(model, tok, envs, seeds, *_, **__):
        out = []
        for env, seed in zip(envs, seeds):
            env.reset(seed)
            e, step = ev.Episode(), None
            while step is None or not step.done:
                answer = env.expert()
                if env.at == 2 or env.at == 1 and env.attempts == 0:
                    env.rule = "ood" if env.rule == "id" else "id"
                    other = env.expert()
                    env.rule = "ood" if env.rule == "id" else "id"
                    answer = other if other != answer else "{}"
                if env.at == 0:
                    answer = answer.replace("First, turn", "First turn")
                step = env.step(answer)
                e.turns.append({**step.info, "text": answer, "tokens": 1, "reward": step.reward, "cut": False})
            e.success = step.info["success"]
            out.append(e)
            made.append(len(env.positions))
        return out
    ev.rollout = player
    try:
        cells = ev.evaluate(model, tok, args, cpu(), 30, 2)
    finally:
        ev.rollout = real
    for k, column in enumerate(("seen", "id", "ood")):
        cell, n = cells[column], sum(made[30 * k:30 * k + 30])
        assert cell["n"] == n and cell["episode"] == {"p": 0, "se": 0, "n": 30}
        assert close(cell["p"], (n - 30) / n) and close(cell["first"]["p"], (n - 60) / n)
        assert 0.3 < cell["matters"]["n"] / n < 0.45 and cell["matters"]["p"] <= 1
        turns, other = cell["matters"]["n"], cell["other_rule"]["p"]
        assert 0 < other < 0.5 and cell["other_rule"]["n"] == turns
        assert cell["working"]["n"] == turns and close(cell["working"]["p"], 1 - 30 / turns)
        assert cell["working"]["then"]["n"] == turns - 30 and close(cell["working"]["then"]["p"], 1 - other * turns / (turns - 30))


def test_tables_over_seeds():
    """eval.py --seeds: mean and standard error over seeds, differences paired by seed, and what it does not mix."""
    def write(path, seed, p, **other):
        cells = lambda p: {column: {"p": p + d, "se": 0.01, "n": 50, "first": {"p": p, "se": 0.01, "n": 50}, "kl": None,
                                    "other_rule": {"p": 0.0, "se": 0.0, "n": 50}} for column, d in (("seen", 0.1), ("id", 0.0), ("ood", 0.05))}
        table = {"env": "gp", "vl": False, "trained_rule": "id", "trained_visual": None, "verify": 5, "temperature": 1.0, "episodes": 50, "k": 1,
                 "seed": seed, "rows": [{"name": "init", "path": "a", **cells(p)}, {"name": "rl", "path": "b", **cells(p + 0.2 + 0.1 * seed)}], **other}
        ev.write_json(path, table)
        return path
    with folder() as out:
        files = [write(f"{out}/{seed}.json", seed, p) for seed, p in ((0, 0.1), (1, 0.2), (2, 0.6))]
        text = quiet(ev.main, ["--seeds", *files])
        init, rl_row = (next(line for line in text.splitlines() if line.startswith(name + " ")) for name in ("init", "rl  "))
        assert "40.0 ± 15.3 |  30.0 ± 15.3 |  35.0 ± 15.3" in init, init  # of .1, .2, .6: mean .3, SE sqrt(.07 / 3)
        assert "60.0 ± 20.8" in rl_row, rl_row                            # of .3, .5, 1.0
        assert "rl - init             | OOD        +30.0 ± 5.8, first +30.0 ± 5.8" in text and "over 3 seeds" in text
        assert "another seed" in error_of(ev.main, ["--seeds", files[0], files[0]])
        assert "another seed" in error_of(ev.main, ["--seeds", files[0], write(f"{out}/v.json", 4, 0.2, verify=1)])
        table = json.load(open(write(f"{out}/v.json", 4, 0.2)))
        for row in table["rows"]:
            row["id"]["working"] = {"p": 0.5, "se": 0.0, "n": 50, "then": {"p": 0.5, "se": 0.0, "n": 25}}
        ev.write_json(f"{out}/v.json", table)
        assert "measures" in error_of(ev.main, ["--seeds", files[0], f"{out}/v.json"])
        with open(f"{out}/v.json", "r+") as f:
            f.truncate(100)
        assert "v.json" in error_of(ev.main, ["--seeds", files[0], f"{out}/v.json"])


def test_virl_command_line():
    """V-IRL through the same scripts, from an empty folder: base -> init -> PPO -> table with steps, turns and routes."""
    with folder() as out:
        small = ["--env", "virl", "--out", out, "--episodes", "1", "--monitor_episodes", "1", "--monitors", "1", "--max_new_tokens", "6",
                 "--verify", "1"]
        text = command("rl.py", "--rule", "ood", "--base_tokens", "2e4", "--init_tokens", "2e3", "--tokens", "1e3", "--batch", "4", *small)
        for part in ("V-IRL: trained rule = ood", "relative directions", "where the rules differ", "whole episodes", "working right", "then action right", "rl  "):
            assert part in text, part
        assert "route_infos.json" in error_of(ev.main, ["--env", "virl", "--out", out, "--rule", "ood", "--data", out])
        assert "--data" in error_of(sft.main, ["--env", "gp", "--stage", "base", "--out", out, "--data", out])


def test_two_ranks_end_to_end():
    """torchrun with two gloo ranks: both loops run, and the ranks' parameters stay equal (checked by the scripts at each save)."""
    with folder() as out:
        copy_of_init(out)
        for script in ("rl.py", "sft.py"):
            text = command("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29512", script, "--out", out, "--tokens", "1e9",
                           "--steps", "2", "--batch", "4", *SMALL)
            assert "x 2 in float32" in text and text.count("trained rule = id") == 1, text[-3000:]


# ----------------------------------------------------------------------------------------------------------------------
# env_virl.py and its part of verifier.py

def test_virl_relative_words():
    """All pairs of whole headings, against turning by hand: step by step to the right until there."""
    for old in range(360):
        for new in range(360):
            right = (new - old) % 360  # degrees to the right
            word = "right" if right < 180 else "left"
            word = f"slightly {word}" if min(right, 360 - right) <= 45 else word
            assert relative_word(old, new) == word, (old, new)
    assert relative_word(0, 45) == "slightly right" and relative_word(0, 46) == "right" and relative_word(0, 45.1) == "right"
    assert relative_word(0, 315) == "slightly left" and relative_word(0, 314) == "left" and relative_word(10, 350) == "slightly left"
    assert relative_word(7, 7) == "slightly right" and relative_word(0, 180) == relative_word(180, 0) == "left"
    assert relative_word(0, 360) == relative_word(360, 0) == "slightly right" and relative_word(-10, 370) == "slightly right"


def test_virl_compass_words():
    for k, word in enumerate(COMPASS):
        for off in range(-22, 23):
            assert all(compass_word(45 * k + off + turn) == word for turn in (-720, -360, 0, 360))
    assert compass_word(22.4) == "north" and compass_word(22.5) == "northeast" and compass_word(337.5) == "north"
    assert compass_word(360) == compass_word(-1e-20) == compass_word(359.99) == "north" and compass_word(298) == "northwest"


def virl_answer(action, seen="nothing nearby"):
    return json.dumps({"current observation": seen, "current instruction": "Go.", "action": action})


def test_virl_verdicts_and_rewards():
    def judge(action, seen="nothing nearby", right="turn_direction(west)", crossing=False):
        v = judge_virl(virl_answer(action, seen), right, crossing)
        assert v.reward == VIRL_REWARD[v.kind] and v.feedback == VIRL_FEEDBACK[v.kind]
        return v.kind, v.reward
    corner = "Oak Inn is on your left, at an intersection"
    assert judge("turn_direction(west)") == judge("turn_direction(west)", corner, crossing=True) == ("correct", 1)
    assert judge("forward()", right="forward()") == judge("stop()", right="stop()") == ("correct", 1)
    for same in ("turn_direction( west )", "turn_direction('west')", 'turn_direction("west")', "turn_direction( ' west ' )"):
        assert judge(same) == ("correct", 1), same
    assert judge("turn_direction('slightly left' )", right="turn_direction(slightly left)") == ("correct", 1)
    for wrong in ("turn_direction(east)", "turn_direction(left)", "forward()", "stop()", "turn_direction(northwest)"):
        assert judge(wrong) == ("wrong_action", -1), wrong
    for action in ("turn_direction(west)", "stop()"):  # the claim is judged before the action
        assert judge(action, corner) == judge(action, crossing=True) == ("wrong_intersection", -1.5)
        assert judge(action, "You see an INTERSECTION") == ("wrong_intersection", -1.5)
        for missing in (None, 7, ["intersection"], {}):
            assert judge(action, missing, crossing=True) == ("wrong_intersection", -1.5)
    for bad in ("", "west", "turn_direction(up)", "turn_direction()", "turn_direction(west", "turn_direction(west))", "turn_direction(West)",
                "turn_direction('west\")", "turn_direction('west)", "turn_direction(''west'')", "turn_direction(slightlyleft)", " forward()",
                "forward( )", "forward", "Forward()", "stop();", "turn_direction (west)", "turn_direction(west) ", "turn_direction(\twest)",
                "turn_direction(west)\n", "forward()stop()", "turn_direction(slightly  left)", None, 7, True, [], ["forward()"], {"a": 1}):
        assert judge(bad) == judge(bad, corner) == ("illegal", -1), bad  # and before the claim comes whether there is an action
    for text in ("", "forward()", "[1]", "null", '{"current observation": "x"}', '{"action": "forward()"', '{"Action": "forward()"}'):
        assert judge_virl(text, "forward()", False).kind == "illegal", text
    assert judge_virl('{"action": "forward()"} or {"action": "stop()"}', "stop()", False).kind == "correct"  # the last one counts
    assert judge_virl(virl_answer("turn_direction( 'west')"), "stop()", False).action == "turn_direction(west)"
    assert set(VIRL_FEEDBACK) == set(VIRL_REWARD) and VIRL_REWARD == {"correct": 1, "wrong_action": -1, "wrong_intersection": -1.5, "illegal": -1}
    for kind, text in VIRL_FEEDBACK.items():
        assert (kind == "correct") != text.endswith("Try again.") and not any(w in text for w in (*COMPASS, *RELATIVE, "forward", "stop"))


def test_virl_verifier_survives_anything():
    nasty = ["[" * 10_000, "{" * 10_000, '{"a":' * 10_000, "null", "\x00", "\ud800", "NaN", '{"action": NaN}', '{"action": 1e999}',
             '{"action": ' + "9" * 10_000 + "}", '{"action": "turn_direction(' + " " * 4000 + '"}', '{"action": "turn_direction(' + "'" * 4000 + ')"}',
             '{"action": "turn_direction(\ud800)", "current observation": "\ud800"}', '{"action": "\\ud800"}', '{"action": "forward()" ' * 500]
    good, rng = virl_answer("turn_direction(slightly left)", "at an intersection"), random.Random(0)
    start = time.perf_counter()
    for i in range(4000 + len(nasty)):
        chars = list(good)
        for _ in range(rng.randrange(1, 6)):
            chars[rng.randrange(len(chars))] = rng.choice('()"{}[]:, \'\\\x00\ud800\u0663abcnu')
        text = nasty[i] if i < len(nasty) else "".join(chars)
        assert judge_virl(text, "turn_direction(slightly left)", True).kind in VIRL_REWARD
    assert time.perf_counter() - start < 5


def virl_expert(**keywords):
    """The expert's walks: all right? -> number of positions."""
    env, count = VIRL(**keywords), 0
    for i in range(40):
        messages, images = env.reset(i)
        assert images == []
        for k, position in enumerate(env.positions):
            answer = env.expert()
            assert json.loads(answer).keys() == {"current observation", "current instruction", "action"} and answer == env.expert()
            assert position.instruction in messages[0]["content"] and f"Now: {position.observation}\n" in messages[0]["content"]
            step = env.step(answer)
            last = k == len(env.positions) - 1
            assert step.reward == 1 and step.info["verdict"] == "correct" and step.info["position_done"] and step.info["position_solved"]
            assert step.done == last == step.info["success"] == (step.messages is None) and not step.info["other_rule"]
            assert step.info["rule_matters"] == ("turn_direction(" in answer) and step.info["working"] is True
            count += 1
            if not last:
                assert [m["role"] for m in step.messages] == ["user"] and step.messages[:len(messages)] != messages
            messages = step.messages
    return count


def test_virl_expert_walks_to_the_end():
    for rule in RULES:
        for split in ("train", "unseen"):
            for move_on in (False, True):
                assert virl_expert(rule=rule, split=split, move_on=move_on, verify=1) > 300


def test_virl_rail():
    """Only the right action moves; `verify` attempts a position; then training ends and evaluation goes on."""
    for rule, verify, move_on in itertools.product(RULES, (1, 2, 3), (False, True)):
        env = VIRL(rule=rule, verify=verify, move_on=move_on)
        for episode in range(12):
            messages, _ = env.reset(episode)
            positions, failed, path = env.positions, episode % len(env.positions), []
            for k, position in enumerate(positions):
                path.append(env.position)
                for attempt in range(verify):
                    if k != failed and attempt == verify - 1:
                        break  # the expert takes the last attempt
                    step = env.step(virl_answer("stop()" if position.action != "stop()" else "forward()", position.observation))
                    assert step.info["verdict"] == "wrong_action" and step.reward == -1 and not step.info["position_solved"]
                    assert step.info["position_done"] == (attempt == verify - 1) and not step.info["success"]
                    if attempt < verify - 1:
                        assert env.position is position and step.messages[:len(messages)] == messages and not step.done
                        assert [m["role"] for m in step.messages[len(messages):]] == ["assistant", "user"]
                        assert step.messages[-1]["content"] == VIRL_FEEDBACK["wrong_action"]
                        messages = step.messages
                if k != failed:
                    step = env.step(env.expert())
                    assert step.info["position_solved"] and step.reward == 1
                if step.done:
                    break
                assert len(step.messages) == 1 and step.messages[:len(messages)] != messages  # fresh
                assert "stop()" not in re.search("Last steps: (.*)", step.messages[0]["content"])[1]  # only right actions are shown
                messages = step.messages
            assert path == (positions if move_on else positions[:failed + 1])
            assert step.done and step.messages is None and not step.info["success"]
    for bad in (dict(rule="x"), dict(split="faces"), dict(verify=0)):
        try:
            VIRL(**bad)
        except ValueError as e:
            assert str(list(bad.values())[0]) in str(e)
        else:
            raise AssertionError(bad)


def test_virl_prompt_states_the_rule():
    """Instructions and steps are the same under both rules but for the words of the turns; the other rule's word is noticed."""
    for seed in range(30):
        envs = [VIRL(rule=rule, move_on=True) for rule in RULES]
        texts = [env.reset(seed)[0][0]["content"] for env in envs]
        assert f"x one of {', '.join(COMPASS)}.\n" in texts[0] and f"x one of {', '.join(RELATIVE)}.\n" in texts[1]
        assert texts[0].split("Route:")[1] == texts[1].split("Route:")[1]
        first, rest = envs[0].instructions[0], envs[0].instructions[1:]
        assert re.fullmatch(rf"First, turn ({'|'.join(RELATIVE)}) to face ({'|'.join(COMPASS)})\.", first)
        assert all(re.fullmatch(r"Move forward until you reach (next intersection|destination) where .+ is on your (left|right)\.", t) for t in rest[::2])
        assert all(re.fullmatch(rf"Turn ({'|'.join(RELATIVE)}) to face ({'|'.join(COMPASS)})\.", t) for t in rest[1::2])
        for position in envs[0].positions:
            answers = [env.expert() for env in envs]
            if position.turn:
                words = [json.loads(a)["action"][15:-1] for a in answers]
                assert f"urn {words[1]} to face {words[0]}." in position.instruction
                assert words == [compass_word(position.turn[1]), relative_word(*position.turn)]
                infos = [env.step(a).info for env, a in zip(envs, answers[::-1])]
                assert all(i["other_rule"] and i["verdict"] == "wrong_action" and i["rule_matters"] for i in infos)
                wrong = "turn_direction(right)" if words[1] == "left" else "turn_direction(left)"  # neither rule's word
                infos = [env.step(virl_answer(wrong, position.observation)).info for env in envs]
                assert not any(i["other_rule"] or i["working"] for i in infos)  # its instruction is "Go."
            else:
                assert answers[0] == answers[1]
                assert not any(env.step(a).info["other_rule"] for env, a in zip(envs, answers))


def test_virl_cells():
    for rule, other in (("id", "ood"), ("ood", "id")):
        envs = {column: VIRL(**keywords) for column, keywords in VIRL.cells(rule).items()}
        assert list(envs) == ["seen", "id", "ood"] and all(e.move_on for e in envs.values()) and not VIRL().move_on
        assert [(e.rule, e.split) for e in envs.values()] == [(rule, "train"), (rule, "unseen"), (other, "unseen")]


def test_virl_splits_and_words():
    """Cities of the two splits share neither streets nor names; every word is frequent; turns are a third of all positions and more."""
    streets, names = {}, {}
    for split in ("train", "unseen"):
        env, compass, relative, positions, routes, legs = VIRL(split=split), [], [], 0, set(), set()
        for i in range(500):
            env.reset(i)
            routes.add(env.route.name)
            legs.add(len(env.route.places) - 1)
            streets.setdefault(split, set()).update(zip(*[[p.point for p in env.route.places[k:]] for k in (0, 1)]))
            names.setdefault(split, set()).update(p.landmark.split(" is on ")[0] for p in env.route.places if p.landmark)
            positions += len(env.positions)
            compass += [compass_word(p.turn[1]) for p in env.positions if p.turn]
            relative += [relative_word(*p.turn) for p in env.positions if p.turn]
            assert len({p.point for p in env.route.places}) == len(env.route.places)
            for p in env.positions:  # an intersection is shown exactly where instructions change on the way
                assert ("intersection" in p.observation) == (p.point in [q.point for q in env.route.places[1:-1]])
        assert legs == {2, 3, 4, 5} and len(routes) > 400 and len(compass) / positions >= 0.35
        share = {w: (compass + relative).count(w) / len(compass) for w in COMPASS + RELATIVE}
        assert all(0.05 < share[w] < 0.25 for w in COMPASS) and all(0.10 < share[w] < 0.40 for w in RELATIVE), share
    assert not names["train"] & names["unseen"] and not streets["train"] & streets["unseen"] and len(names["unseen"]) > 20


def test_virl_same_seed_same_routes_in_another_process():
    code = ("from env_virl import VIRL; e = VIRL(seed=5); e.reset(); import random; from env_virl import document; r = random.Random(1);"
            "print([(e.reset(f's{i}')[0], e.route.name, e.positions) for i in range(10)], [document(r) for _ in range(20)])")
    outputs = set()
    for salt in "12":
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": salt})
        outputs.add(done.stdout)
        assert done.returncode == 0 and len(done.stdout) > 2000, done.stderr
    assert len(outputs) == 1
    a, b = VIRL(seed=1), VIRL(seed=1, rule="ood")
    assert [a.reset() and a.route for _ in range(5)] == [b.reset() and b.route for _ in range(5)]  # the rule changes no route
    assert len({VIRL(seed=s).reset()[0][0]["content"] for s in range(20)}) > 15


def test_virl_documents():
    rng, n = random.Random(0), 9000
    chats = walks = wrong = turns = feedback = 0
    spaces = dict.fromkeys(env_virl.SPACES, 0)
    for _ in range(n):
        doc = env_virl.document(rng)
        text = doc[0]["content"] if isinstance(doc, list) else doc
        words = re.search(r"x one of (.*)\.\n", text)[1].split(", ")
        space = next(s for s in env_virl.SPACES if list(env_virl.SPACES[s]) == words)
        spaces[space] += 1
        instructions = text.split("Route:\n")[1].split("\nLast steps: ")[0].split("\nNow: ")[0].split("\n")
        right = []  # the word that each turn should have: the one of its two that the space has
        for line in instructions:
            if m := re.fullmatch(r"(?:First, turn|Turn) (.+) to face (.+)\.", line):
                right.append(next(w for w in m.groups() if w in words))
            else:
                assert line.startswith("Move forward until you reach "), line
        if isinstance(doc, list):
            chats += 1
            assert [m["role"] for m in doc] == ["user", "assistant"] * (len(doc) // 2) and len(doc) in (2, 4) and space in RULES
            assert text.startswith("You walk along a route")
            feedback += len(doc) == 4
            answers = [m["content"] for m in doc[1::2]]
        elif doc.startswith("A walk."):
            walks += 1
            said = re.findall(r"turn_direction\(([^()]+)\)", doc.split("Route:")[1])
            assert len(said) == len(right) and set(said) <= set(words) and doc.endswith('"stop()"}')
            turns += len(said)
            wrong += sum(a != b for a, b in zip(said, right))
            answers = doc.split("\n")[-1 - 2 * doc.count("\nNow: ") + 2::2]
            assert len(answers) == doc.count("\nNow: ") >= 2 * len(right)
        else:
            answers = [doc.split("\n")[-1]]
        for answer in answers:
            fields = json.loads(answer)
            assert fields["current instruction"] in instructions and f"Now: {fields['current observation']}\n" in text
            assert (m := re.fullmatch(r"forward\(\)|stop\(\)|turn_direction\((.+)\)", fields["action"])) and (not m[1] or m[1] in words)
            assert bool(m[1]) == ("urn " in fields["current instruction"])
    assert 0.12 < chats / n < 0.18 and 0.14 < walks / n < 0.20 and 0.08 < wrong / turns < 0.12 and feedback > 120
    assert all(c / n > 0.1 for c in spaces.values()) and spaces["id"] / n > 0.25 and spaces["ood"] / n > 0.25
    assert all(isinstance(env_virl.document(rng, chat_share=1.0), list) for _ in range(20))
    assert all(isinstance(env_virl.document(rng, chat_share=0.0), str) for _ in range(50))


def test_virl_prompts_are_short():
    """In the tiny model's tokenizer every varying word is one token, and a prompt about 60."""
    tok, lengths = sft.build_tiny(VIRL, 0)[1], []
    seen = [f"{name} is on your {side}" for name in env_virl.LANDMARKS for side in ("left", "right")]
    for word in (*COMPASS, *RELATIVE, *seen, *env_virl.SPACES["clock"], *env_virl.SPACES["letters"]):
        assert len(tok(word, add_special_tokens=False).input_ids) == 1, word
    for rule in RULES:
        env = VIRL(rule=rule)
        for i in range(40):
            messages, _ = env.reset(i)
            while messages:
                lengths.append(len(ev.prompt(tok, messages).ids))
                words = [tok.decode([t]) for t in ev.prompt(tok, messages).ids]
                assert not env.position.turn or {relative_word(*env.position.turn), compass_word(env.position.turn[1])} <= set(words)
                messages = env.step(env.expert()).messages
    print(f"    prompts: {sum(lengths) / len(lengths):.0f} tokens, {min(lengths)} to {max(lengths)}; vocabulary {len(tok)}")
    assert 45 < sum(lengths) / len(lengths) < 70 and max(lengths) < 110


# The released format, made here. Names as they come: bare quotes, braces, commas, several scripts.

VIRL_NAMES = ['Joe\'s "Best" Deli', "Smith, Sons & Co.", "{Brackets} Bar", "東京ラーメン", "Кафе «Пушкин»", "مطعم", "The Intersection Inn", "$5 Pizza \\ More"]


def virl_route(k):
    """One route with four places. Odd ones have their first leg short (under 5 m) and turn by headings of exactly 0 and 360."""
    start = [40.7 + 0.01 * k, -74.0]
    points = [start, [start[0] + (0.00002 if k % 2 else 0.001), -74.0], [start[0] + 0.001, -73.999], [start[0] + 0.002, -73.999]]
    a, b, c = (VIRL_NAMES[(k + i) % len(VIRL_NAMES)] for i in range(3))
    headings = ["0 (north)", "90 (east)", "360 (north)"] if k % 2 else ["359 (north)", "91.5 (east)", "298 (northwest)"]
    landmarks = ["No landmark nearby", f"{a} is on your right", "No landmark nearby" if k % 3 == 0 else f"{b} is on your left",
                 f"The destination {c} is on your left"]
    blocks = ""
    for i in range(4):
        ahead = f'"to_next_intersection_heading": "{headings[i]}",\n' if i < 3 else ""
        blocks += (f'{{\n"intersection_idx": {i},\n"landmarks": "{landmarks[i]}",\n"distance": "{16 + i} meters",\n'
                   f'"human_heading": "{(90 * i) % 360} (x)",\n{ahead}}},\n')
    landmark = {"name": a, "geocode": points[1], "spatial_relation": "right", "expression": "on your right"}
    return {"start_place": {"relocated_geocode": start}, "init_heading": (0, 360, 45)[k % 3], "dest_place": {"name": c},
            "route_results": {"geocode_list": points, "landmark_list": [None, landmark, None if k % 3 == 0 else {**landmark, "name": b}]},
            "milestone_info": blocks}


def write_virl(path, routes, panoramas="exact"):
    with open(f"{path}/route_infos.json", "w", encoding="utf-8") as f:
        json.dump([routes, 7], f)
    if panoramas == "exact":
        panoramas = {tuple(p): f"pano_{i}" for r in routes for i, p in enumerate(r["route_results"]["geocode_list"])}
    if panoramas is not None:
        with open(f"{path}/gps_pano_mapping.pkl", "wb") as f:
            f.write(panoramas if isinstance(panoramas, bytes) else pickle.dumps(panoramas))
    return path


def test_virl_released_format():
    with folder() as path:
        write_virl(path, [virl_route(k) for k in range(30)])
        for rule in RULES:
            for split in ("train", "unseen"):
                assert virl_expert(rule=rule, split=split, data=path) > 200
                assert virl_expert(rule=rule, split=split, data=path, move_on=True, verify=1) > 200
        routes = {s: {r.name for r in VIRL(split=s, data=path).routes} for s in ("train", "unseen")}
        assert not routes["train"] & routes["unseen"] and len(routes["train"] | routes["unseen"]) == 30 and 2 <= len(routes["unseen"]) <= 12
        seen, facings, between = {}, {}, {}
        for split in ("train", "unseen"):
            env = VIRL(rule="ood", split=split, data=path)
            for i in range(300):
                env.reset(i)
                k = int(env.route.name.split()[-1])
                seen[k] = env.instructions
                facings.setdefault(k % 3, set()).add(env.positions[0].turn[0])
                moves = [p.instruction for p in env.positions if p.action == "forward()"]
                between.setdefault(k % 2, []).append([moves.count(env.instructions[j]) - 1 for j in (1, 3, 5)])
                if k % 2 == 1:
                    assert env.positions[0].turn[1] == 0.0 and env.positions[0].instruction.endswith("to face north.")
                for p in env.positions:  # the points lie on the way; intersections are told where they are
                    assert 40.69 < p.point[0] < 41.1 and -74.001 < p.point[1] < -73.998
                    if p.turn and p is not env.positions[0]:
                        assert p.observation.endswith(", at an intersection")
                while not env.step(env.expert()).done:
                    past = env.messages[0]["content"].split("Last steps: ")[1].split("\nNow: ")[0]
                    assert past.count("; ") == env.at - 1  # here all steps are shown
        assert len(facings[0]) > 50 and facings[1] == {360} and facings[2] == {45}  # 0 = unset, 360 = north
        long = [n for row in between[0] for n in row] + [n for row in between[1] for n in row[1:]]
        assert {n for row in between[1] for n in row[:1]} == {0} and set(long) == set(range(6)) and 2.3 < sum(long) / len(long) < 2.7
        assert len(seen) == 30
        for k, instructions in seen.items():
            assert f"where {VIRL_NAMES[k % 8]} is on your right." in instructions[1]
            assert (instructions[3] == "Move forward until you reach next intersection.") == (k % 3 == 0)
            assert instructions[5] == f"Move forward until you reach destination where {VIRL_NAMES[(k + 2) % 8]} is on your left."
        env = VIRL(data=path)
        same_seed = [env.reset("x")[0] for _ in range(2)]
        assert same_seed[0] == same_seed[1]


def test_virl_milestones():
    text = ('[{"intersection_idx": 0, "landmarks": "A \\"B\\" {C}, D is on your left", "distance": "1 meters"},'
            '{ "distance": "2 meters",\n"landmarks": "{", },{"landmarks": "The "Q"", "intersection_idx": 3 , }, ]')
    assert env_virl.milestones(text) == [{"intersection_idx": "0", "landmarks": 'A "B" {C}, D is on your left', "distance": "1 meters"},
                                         {"distance": "2 meters", "landmarks": "{"}, {"landmarks": 'The "Q"', "intersection_idx": "3"}]
    assert env_virl.milestones("") == env_virl.milestones("no braces") == []


def test_virl_damaged_data():
    """Each kind of damage: one ValueError that names the file, the route and the key."""
    def damage(key, change, whole=False):
        routes = [virl_route(k) for k in range(12)]
        if whole:
            routes[3] = change
        else:
            change(routes[3])
        with folder() as path:
            write_virl(path, routes, None)
            error(path, "route 3: ", key)

    def error(path, *words):
        try:
            VIRL(data=path)
        except ValueError as e:
            message = str(e)
            assert isinstance(e, ValueError) and path in message and "\n" not in message and all(w in message for w in words), (words, message)
            assert len(message) < 500
        else:
            raise AssertionError(f"no error: {words}")

    def replaced(old, new, count=1):
        def change(route):
            assert old in route["milestone_info"], old
            route["milestone_info"] = route["milestone_info"].replace(old, new, count)
        return change
    keys = ("start_place.relocated_geocode", "init_heading", "route_results.geocode_list", "route_results.landmark_list", "dest_place", "milestone_info")
    for key in keys:
        *outer, inner = key.split(".")
        for value in (None, "x", [], {"a": 1}, [1], [1, 2, 3], ["1", "2"], [91, 0], [0, 181], [float("nan"), 0], True, 1e999, float("nan"), 999, "missing"):
            if (key, value) == ("dest_place", {"a": 1}):
                continue
            def change(route):
                place = route[outer[0]] if outer else route
                place.pop(inner) if value == "missing" else place.update({inner: value})
            damage(key, change)
    for part in ("start_place", "route_results"):
        damage(part, lambda route: route.update({part: None}))
    for route in (None, 7, [], "x", {}, [{}]):
        damage("route_results.geocode_list: it is missing", route, whole=True)
    damage("route_results.geocode_list", lambda r: r["route_results"].update(geocode_list=[[1, 2]]))
    damage("route_results.landmark_list", lambda r: r["route_results"]["landmark_list"].pop())
    for bad in ({}, {"name": 1}, 7, "x", {"name": "x", "geocode": None, "spatial_relation": "", "expression": ""}, {"name": "x", "geocode": [1, 2]}):
        damage("route_results.landmark_list", lambda r: r["route_results"]["landmark_list"].__setitem__(1, bad))
    damage("milestone_info", lambda r: r.update(milestone_info=r["milestone_info"] + r["milestone_info"]))
    damage("milestone_info", lambda r: r.update(milestone_info=r["milestone_info"][:-4]))  # cut off
    damage("milestone_info", lambda r: r.update(milestone_info=r["milestone_info"][:len(r["milestone_info"]) // 2]))
    damage("milestone_info.intersection_idx", replaced('"intersection_idx": 1,', '"intersection_idx": one,'))
    damage("milestone_info.intersection_idx", replaced('"intersection_idx": 1,\n"', '"'))
    damage("milestone_info.landmarks", replaced("is on your right", "on your right"))
    damage("milestone_info.landmarks", replaced("The destination ", ""))
    damage("milestone_info.landmarks", replaced("No landmark nearby", "The destination X is on your left"))
    damage("milestone_info.landmarks", replaced("No landmark nearby", "\ud800 is on your left"))
    damage("milestone_info.landmarks", replaced("No landmark nearby", ""))
    damage("milestone_info.landmarks", replaced("No landmark nearby", "x" * 2000 + " is on your left"))
    damage("milestone_info.landmarks", replaced('nearby",', "nearby,"))
    damage("milestone_info.landmarks", replaced('"landmarks":', '"landmark":'))
    damage("milestone_info.distance", replaced("16 meters", "far"))
    damage("milestone_info.distance", replaced('"distance": "16 meters",', ""))
    damage("milestone_info.human_heading", replaced("90 (x)", "east"))
    damage("milestone_info.to_next_intersection_heading", replaced("90 (east)", "(east)"))
    damage("milestone_info.to_next_intersection_heading", replaced('"to_next_intersection_heading": "90 (east)",', ""))
    damage("milestone_info.to_next_intersection_heading", replaced('"to_next', '"to_next_intersection_heading": "1",\n"to_next'))

    with folder() as path:
        error(path, "route_infos.json")
        for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{}", b"[]", b"[[], 0]", b"[[1]]", b"null", b"[1, 2]", b"9" * 5000):
            env_virl.load_routes.cache_clear()
            with open(f"{path}/route_infos.json", "wb") as f:
                f.write(text)
            error(path, "route_infos.json")
    with folder() as path:
        write_virl(path, [virl_route(1)])
        for split in ("train", "unseen"):  # one of the two has no route
            try:
                assert VIRL(split=split, data=path).routes
            except ValueError as e:
                assert "route_infos.json" in str(e) and split in str(e)


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.path,)


def test_virl_panoramas():
    """Exact place, else the nearest within 20 m; the pickle may hold plain things only, and nothing in it runs."""
    routes = [virl_route(k) for k in range(8)]
    exact = {tuple(p): "id" for r in routes for p in r["route_results"]["geocode_list"]}

    def load(panoramas):
        with folder() as path:
            Evil.path = f"{path}/evil"
            try:
                write_virl(path, routes, panoramas() if callable(panoramas) else panoramas)
                return len(VIRL(data=path).routes) > 0
            except ValueError as e:
                assert "gps_pano_mapping.pkl" in str(e) and "\n" not in str(e), str(e)
                return str(e)
            finally:
                assert not os.path.exists(Evil.path)
    assert load(exact) is True and load({(a + 0.00017, b): v for (a, b), v in exact.items()}) is True       # 19 m to the north
    assert "geocode" in load({(a + 0.00019, b): v for (a, b), v in exact.items()})                           # 21 m
    assert load({(a, b + 0.00023): v for (a, b), v in exact.items()}) is True and "20 m" in load({(a, b + 0.00025): v for (a, b), v in exact.items()})
    lost = tuple(routes[5]["route_results"]["geocode_list"][2])
    assert "route 5" in (message := load({k: v for k, v in exact.items() if k != lost})) and str(lost) in message
    assert "route 0" in load({})
    assert "mkdir" in load(lambda: {**exact, (1.0, 2.0): Evil()}) and "mkdir" in load(lambda: Evil())
    assert "Fraction" in load({(Fraction(1), 2.0): "x"})
    for bad in (b"", b"junk", pickle.dumps(exact)[:-20], b"cos\nsystem\n(S'true'\ntR.", b"\x80\x05\x95" + b"\xff" * 8, pickle.dumps(None), 7, [1], {1: "x"}, {(1.0,): "x"},
                {("a", "b"): "x"}, {(1.0, 2.0): 3}, {(91.0, 0.0): "x"}, {(float("nan"), 0.0): "x"}):
        assert isinstance(load(bad), str), bad
    near = {(0.0, 0.0): "a", (0.0001, 0.0): "b"}
    assert [env_virl.panorama_at(p, near, list(near)) for p in ((0.0, 0.0), (0.00006, 0.0), (-0.0001, 0.0), (0.0, 0.001))] == ["a", "b", "a", None]


# Pictures.

def views_of(picture):
    """A picture -> its four views as int arrays, {"front": [side, side, 3], ...}."""
    pixels, side = np.asarray(picture, int), picture.width // 2
    return {view: pixels[i // 2 * side:][:side, i % 2 * side:][:, :side] for i, view in enumerate(("front", "right", "back", "left"))}


def test_virl_pictures_same_seed_same_bytes_in_another_process():
    code = ("import hashlib, random; from env_virl import VIRL, picture_document; h = hashlib.sha256()\n"
            "for visual in ('id', 'ood'):\n"
            "    e = VIRL(seed=5, vl=True, visual=visual)\n"
            "    for seed in (None, None, 'a', 7):\n"
            "        images = e.reset(seed)[1]\n"
            "        while images:\n"
            "            h.update(images[0].tobytes()); images = e.step(e.expert()).images\n"
            "r = random.Random(1)\n"
            "for _ in range(40):\n"
            "    doc, images = picture_document(r); h.update(str(doc).encode()); h.update(images[0].tobytes())\n"
            "print(h.hexdigest())")
    outputs = {subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": salt}).stdout for salt in "12"}
    assert len(outputs) == 1 and len(outputs.pop()) == 65
    a, b = VIRL(seed=3, vl=True), VIRL(seed=4, vl=True)
    first = [a.reset("x")[1][0].tobytes() for _ in range(2)]
    assert first[0] == first[1] == b.reset("x")[1][0].tobytes() != b.reset("y")[1][0].tobytes()  # only the episode's seed counts
    assert a.reset()[1][0].tobytes() != first[0] and VIRL(seed="x", vl=True).reset()[1][0].tobytes() == first[0]


def test_virl_pictures_through_a_route():
    """The same routes as in words, the observation out of the prompt; a conversation keeps its picture, a new one has another."""
    for visual, rule, move_on in itertools.product(("id", "ood"), RULES, (False, True)):
        keywords = dict(rule=rule, visual=visual, move_on=move_on)
        text, vl = VIRL(**keywords), VIRL(**keywords, vl=True, pixels=32)
        for i in range(8):
            (words, none), (messages, images) = text.reset(i), vl.reset(i)
            assert none == [] and text.route == vl.route and text.positions == vl.positions
            pictures = []
            while messages:
                seen = vl.position.observation
                assert f"Now: {env_virl.SEEN}\n" in messages[0]["content"] and "picture" not in words[0]["content"]
                assert messages[0]["content"].replace(env_virl.SEEN, seen) == words[0]["content"]
                assert len(images) == 1 and images[0].mode == "RGB" and images[0].size == (32, 32)
                pictures.append(images[0].tobytes())
                wrong = vl.step(virl_answer("stop()" if vl.position.action != "stop()" else "forward()", "a tower"))
                assert wrong.images is images and wrong.messages[0] == messages[0] and images[0].tobytes() == pictures[-1]
                open_question = vl.at > 0 and vl.positions[vl.at - 1].action == "forward()"  # elsewhere the prompt tells what is seen
                assert wrong.info["recognized"] < 1 if open_question else wrong.info["recognized"] is None
                step, told = vl.step(vl.expert()), text.step(text.expert())
                assert step.info["recognized"] == (1 if open_question else None) and told.info["recognized"] is None and told.images == []
                assert {**step.info, "recognized": None} == told.info and step.reward == told.reward and step.images is not images
                (messages, images), words = (step.messages, step.images), told.messages
            assert images == [] and step.done and len(set(pictures)) == len(pictures)
    names = {split: {n for city in env_virl.ABROAD[split] for n, _ in env_virl.city(city)[2]} for split in ("train", "unseen")}
    assert not names["train"] & names["unseen"] and len({city for table in (env_virl.CITIES, env_virl.ABROAD) for row in table.values() for city in row}) == 8
    for bad in (dict(visual="x"), dict(pixels=0)):
        try:
            VIRL(vl=True, **bad)
        except ValueError as e:
            assert str(list(bad.values())[0]) in str(e)
        else:
            raise AssertionError(bad)


def test_virl_what_the_eyes_decide():
    """What a picture decides in V-IRL-VL: after a first forward(), has the walker arrived? A player that always says so without looking has
    about 85% of first attempts, and of second ones all. (README and env_virl.py say that.)"""
    right = total = open_questions = 0
    for i in range(200):
        env = VIRL(split="unseen", vl=True, pixels=16)
        env.reset(i)
        actions = [p.action for p in env.positions]  # None: a turn
        for at, action in enumerate(actions):
            asked = at > 0 and actions[at - 1] == "forward()" and actions[at - 2] != "forward()"  # at most one step lies between
            right, total, open_questions = right + (not asked or action != "forward()"), total + 1, open_questions + asked
            assert asked or at == 0 or (action == "forward()") == (actions[at - 1] is None)
    assert 0.82 < right / total < 0.88 and 0.25 < open_questions / total < 0.4, (right / total, open_questions / total)


def test_virl_views_show_the_observation():
    """The landmark is in the view of its side alone, the zebra crossing in all four, and nothing else changes; each look has its colours."""
    for look, pixels in itertools.product(env_virl.LOOKS, (80, 81, 300)):
        def views(observation):
            picture = env_virl.draw_picture(look, "Aldham", observation, "s", pixels)
            assert picture.size == (pixels, pixels)
            return views_of(picture)

        def changed(a, b):
            a, b = views(a), views(b)
            return [view for view in a if np.abs(a[view] - b[view])[1:-1, 1:-1].max() > 40]
        for crossing in ("", ", at an intersection"):
            plain = f"nothing nearby{crossing}"
            assert changed(plain, f"Oak Inn is on your left{crossing}") == ["left"] and changed(plain, f"Oak Inn is on your right{crossing}") == ["right"]
            assert changed(f"Oak Inn is on your left{crossing}", f"Oak Cafe is on your left{crossing}") == ["left"]
        assert changed("at an intersection", "nothing nearby, at an intersection") == []
        assert changed("at an intersection", "nothing nearby") == ["front", "right", "back", "left"]
        for name in ("", "Sun Bank is on your right, "):
            for view in views(f"{name}at an intersection").values():  # white or yellow at the bottom
                bottom = view[int(0.85 * len(view)):int(0.95 * len(view))]
                assert 0.3 < (np.abs(bottom - env_virl.LOOKS[look]["zebra"]).max(-1) < 40).mean() < 0.7
        sky = [view[len(view) // 8, len(view) // 2] for view in views("at an intersection").values()]
        assert all(np.abs(colour - env_virl.city_style(look, "Aldham")["sky"]).max() < 12 for colour in sky)
        towns = [town for table in (env_virl.CITIES, env_virl.ABROAD) for row in table.values() for town in row]  # each has colours of its own
        styles = [env_virl.city_style(look, town) for town in towns]
        assert len({str(style) for style in styles}) == len(towns) and all(
            np.abs(np.subtract(style["walls"], env_virl.LOOKS[look]["walls"])).max() <= 25 and style["zebra"] == env_virl.LOOKS[look]["zebra"] for style in styles)
    drawn = {env_virl.draw_picture("id", town, "at an intersection", seed).tobytes() for town in ("Aldham", "Corvale") for seed in range(25)}
    assert len(drawn) == 50


def test_virl_landmarks_can_be_told_apart():
    """At 80 pixels: drawn at the same place, any two of the 60 differ clearly; and each is known again, drawn with other random details,
    by the closest of the 60 among all shifts by up to four pixels."""
    names = env_virl.LANDMARKS
    for look in env_virl.LOOKS:
        a, b = (np.stack([views_of(env_virl.draw_picture(look, "Corvale", f"{name} is on your right", f"{seed}{name if seed else ''}"))["right"].mean(-1)
                          for name in names]) for seed in (0, 1))  # [60, 40, 40]
        apart = np.array([[(np.abs(x - y) > 60).sum() for y in a] for x in a]) + 10 ** 6 * np.eye(60)
        assert apart.min() > 60, (look, apart.min())  # of 1600 pixels
        best = np.full((60, 60), np.inf)
        for down, right in itertools.product(range(-5, 6), range(-4, 5)):
            moved = np.roll(a, (down, right), (1, 2))[:, 8:24, 4:36].reshape(60, -1)
            best = np.minimum(best, np.abs(b[:, None, 8:24, 4:36].reshape(60, 1, -1) - moved[None]).mean(-1))
        assert (best.argmin(1) == np.arange(60)).mean() > 0.95, look


def test_virl_recognized():
    corner, house, none = "Oak Inn is on your left, at an intersection", "Oak Inn is on your left", "nothing nearby"
    for said, truth, share in (
            (corner, corner, 1), (house, house, 1), (none, none, 1), ("at an intersection", "at an intersection", 1),
            ("  OAK inn\nis on  your left, AT an Intersection ", corner, 1), ("Nothing  Nearby", none, 1),
            (house, corner, 2 / 3), (corner, house, 2 / 3), ("Oak Inn is on your right, at an intersection", corner, 2 / 3),
            ("Oak Cafe is on your left, at an intersection", corner, 2 / 3), ("Oak Inn, at an intersection", corner, 2 / 3),
            ("Sun Cafe is on your right", corner, 0), ("Sun Cafe is on your left", corner, 1 / 3), (none, corner, 0), ("at an intersection", corner, 1 / 3),
            (none, house, 1 / 3), ("at an intersection", none, 1 / 2), (none, "at an intersection", 1 / 2), (house, none, 1 / 2), (corner, none, 0),
            (house, "at an intersection", 0), (corner, "at an intersection", 1 / 2), ("", none, 0), (" ", none, 0), ("Oak Inn", house, 2 / 3),
            (f"{none}, at an intersection", "at an intersection", 1), ("東京 is on your right", "東京 is on your right", 1),
            ("The \"A is B\" Inn is on your left", "The \"A is B\" Inn is on your left", 1), ("\ud800", house, 1 / 3), ("x" * 5000, house, 0)):
        assert abs(env_virl.recognized(virl_answer("forward()", said), truth) - share) < 1e-9, (said, truth)
    for text in ("", "forward()", "null", "[1]", "{" * 10_000, '{"a":' * 10_000, '{"action": "forward()"}', '{"current observation": "nothing nearby"', "\ud800", "\x00",
                 '{"current observation": ' + "9" * 10_000 + "}", *(virl_answer("forward()", x) for x in (None, 7, True, [], ["nothing nearby"], {}, {"a": none}, 1e999))):
        assert env_virl.recognized(text, none) == env_virl.recognized(text, corner) == 0.0, text
    rng = random.Random(0)
    for _ in range(3000):
        chars = list(virl_answer("forward()", corner))
        for _ in range(rng.randrange(1, 6)):
            chars[rng.randrange(len(chars))] = rng.choice('()"{}[]:, \'\\\x00\ud800\u0663is')
        assert 0 <= env_virl.recognized("".join(chars), rng.choice((corner, house, none))) <= 1


def test_virl_cells_with_pictures():
    assert VIRL.cells("id") == VIRL.cells("id", None) and set(VIRL.visual_names) == set(env_virl.LOOKS)
    for rule, visual in itertools.product(RULES, env_virl.LOOKS):
        cells, (other, unusual) = VIRL.cells(rule, visual), ({"id": "ood", "ood": "id"}[x] for x in (rule, visual))
        assert list(cells) == ["seen", "id", "ood", "visual"] and all(k["vl"] and k["move_on"] for k in cells.values())
        assert [(k["rule"], k["split"], k["visual"]) for k in cells.values()] == [
            (rule, "train", visual), (rule, "unseen", visual), (other, "unseen", visual), (rule, "unseen", unusual)]
        routes = {c: {(e.reset(i), e.route.name.split()[0])[1] for i in range(20)} for c, k in cells.items() for e in [VIRL(**k)]}
        assert routes["id"] == routes["ood"] and not routes["seen"] & routes["id"] and not routes["visual"] & (routes["seen"] | routes["id"])


def test_virl_picture_documents():
    """Valid pieces; what is said of the usual look is true, and of the unusual one (a tenth) half is wrong in landmark and side."""
    looks, n, real = [], 1500, env_virl.draw_picture
    chats = captions = feedback = said_wrong = unusual = 0
    names, rng = set(), random.Random(0)
    try:
        env_virl.draw_picture = lambda look, town, observation, *more: looks.append((look, observation)) or real(look, town, observation, *more)
        for _ in range(n):
            doc, images = env_virl.picture_document(rng, pixels=16)
            (look, truth), text = looks[-1], doc[0]["content"] if isinstance(doc, list) else doc
            assert len(images) == 1 and images[0].size == (16, 16) and images[0].mode == "RGB"
            assert text.count("<image>") == (0 if isinstance(doc, list) else len(images))
            if text.startswith("<image>\nNow: "):
                captions, said = captions + 1, {text.removeprefix("<image>\nNow: ")}
                names.add(env_virl.observation_parts(truth)[0])
            else:
                assert text.count(f"Now: {env_virl.SEEN}") == text.count("Now: ") == 1
                answers = [m["content"] for m in doc[1::2]] if isinstance(doc, list) else [doc.split("\n")[-1]]
                said = {json.loads(a)["current observation"] for a in answers}
                assert all(json.loads(a)["current instruction"] in text for a in answers)
            if isinstance(doc, list):
                assert [m["role"] for m in doc] == ["user", "assistant"] * (len(doc) // 2) and text.startswith("You walk along a route")
                chats, feedback = chats + 1, feedback + (len(doc) == 4)
            assert len(said) == 1 and ("intersection" in (words := said.pop())) == ("intersection" in truth)
            unusual, said_wrong = unusual + (look == "ood"), said_wrong + (words != truth)
            assert look == "ood" or words == truth
        assert 0.12 < chats / n < 0.18 and 0.64 < captions / n < 0.72 and feedback > 5 and 0.08 < unusual / n < 0.12
        assert 0.35 < said_wrong / unusual < 0.65 and names == {"", *env_virl.LANDMARKS}
        assert all(isinstance(env_virl.picture_document(rng, 1.0)[0], list) for _ in range(20))
        assert all(isinstance(env_virl.picture_document(rng, 0.0)[0], str) for _ in range(50))
        assert env_virl.SEEN in env_virl.fragments(vl=True)
    finally:
        env_virl.draw_picture = real


def test_virl_drawing_speed():
    start = time.perf_counter()
    for i in range(100):
        env_virl.draw_picture("id", "Aldham", "Oak Bank is on your left, at an intersection", i)
    each = (time.perf_counter() - start) / 100
    print(f"    {1e3 * each:.1f} ms a picture")
    assert each < 0.02


def compass_panorama(width, rotation):
    """Every column knows its compass heading h (red, green: cosine and sine), every row its height (blue: 0 top, 255 bottom)."""
    heading = np.radians((np.arange(width) + 0.5) / width * 360 - rotation)[None]
    row = (np.arange(width // 2) + 0.5)[:, None] / (width // 2)
    channels = np.broadcast_arrays(127.5 + 127.5 * np.cos(heading), 127.5 + 127.5 * np.sin(heading), 255 * row)
    return np.stack(channels, -1).round().astype(np.uint8)


def test_virl_projection():
    """Views of a panorama that encodes direction: each pixel shows the heading atan(x) and the height atan(y / hypot(1, x)) off the centre."""
    for rotation, heading, side in itertools.product((0, 37.5, -90, 200, 360), (0, 1, 45, 90, 179.9, 298, 359.5, 405, -30), (41, 40)):
        view = env_virl.perspective(compass_panorama(1440, rotation), heading, rotation, side)
        assert view.shape == (side, side, 3) and view.dtype == np.uint8
        red, green, blue = (view.astype(float) / 127.5 - 1).transpose(2, 0, 1)
        x = (np.arange(side) * 2 + 1 - side) / side
        off = (np.degrees(np.arctan2(green, red)) - heading - np.degrees(np.arctan(x))[None] + 180) % 360 - 180
        assert np.abs(off).max() < 0.6, (rotation, heading, np.abs(off).max())
        rise = np.degrees(np.arctan2(-x[:, None], np.hypot(1, x[None])))
        assert np.abs(-90 * blue - rise).max() < 0.6 and blue[0].max() < 0 < blue[-1].min()  # up is up
    ramp = np.zeros((8, 16, 3), np.uint8)
    ramp[:, 0], ramp[:, -1] = 200, 100  # the seam lies between these: half of each
    assert env_virl.perspective(ramp, 0, 0, 1).tolist() == [[[150] * 3]] and env_virl.perspective(ramp, 350, 10, 1).tolist() == [[[150] * 3]]
    assert env_virl.perspective(ramp, 11.25, 0, 1).tolist() == [[[200] * 3]] and env_virl.perspective(ramp, -11.25, 0, 1).tolist() == [[[100] * 3]]


COLOURS = {0: (220, 30, 30), 90: (30, 200, 30), 180: (30, 30, 220), 270: (230, 230, 230)}  # north, east, south, west


def write_street_views(path, routes, rotation=70):
    """Panoramas with a colour to each side of the world, one for each point that a walk can reach."""
    walked = [[r["start_place"]["relocated_geocode"]] + r["route_results"]["geocode_list"][1:] for r in routes]
    points = {tuple(x + k / 6 * (y - x) for x, y in zip(a, b)) for line in walked for a, b in zip(line, line[1:]) for k in range(7)}
    write_virl(path, routes, {point: f"pano_{i}" for i, point in enumerate(sorted(points))})
    heading = ((np.arange(720) + 0.5) / 2 - rotation) % 360
    row = np.array([COLOURS[int((h + 45) % 360 // 90) * 90] for h in heading], np.uint8)
    os.mkdir(f"{path}/street_views")
    for i in range(len(points)):
        Image.fromarray(np.repeat(row[None], 360, 0)).save(f"{path}/street_views/pano_{i}.jpg", quality=95)
        with open(f"{path}/street_views/pano_{i}.metadata.json", "w") as f:
            json.dump({"rotation": rotation}, f)
    return path


def test_virl_street_views_of_the_data_set():
    with folder() as path:
        os.mkdir(f"{path}/ood")
        write_street_views(path, [virl_route(k) for k in range(6)])
        write_street_views(f"{path}/ood", [virl_route(k) for k in range(10, 16)], rotation=-15.5)
        for visual, pixels in (("id", 80), ("ood", 33)):
            env, text = (VIRL(data=path, visual=visual, vl=vl, pixels=pixels, move_on=True) for vl in (True, False))
            for i in range(6):
                (messages, images), _ = env.reset(i), text.reset(i)
                while messages:
                    assert images[0].size == (pixels, pixels) and env.position == text.position
                    for view, turn in (("front", 0), ("right", 90), ("back", 180), ("left", 270)):  # look at each view's middle
                        middle = views_of(images[0])[view][pixels // 4, pixels // 4]
                        heading = (env.position.heading + turn) % 360
                        if abs((heading + 45) % 90 - 45) < 40:
                            assert np.abs(middle - COLOURS[round(heading / 90) * 90 % 360]).max() < 40, (view, heading, middle)
                    step = env.step(env.expert())
                    assert step.info["recognized"] in (1, None)
                    messages, images = step.messages, step.images
                    text.step(text.expert())
        assert env_virl.load_panorama.cache_info().maxsize <= 16
        shape = env_virl.load_panorama(f"{path}/street_views/pano_0.jpg", 40).shape
        assert shape == (160, 320, 3)


def test_virl_damaged_street_views():
    """Each kind of damage: one ValueError that names the route and the file, and the key where there is one."""
    def error(damage, *words, visual="id", play=False):
        with folder() as path:
            write_street_views(path, [virl_route(k) for k in (1, 3)], rotation=0)
            ids = sorted(os.listdir(f"{path}/street_views"))
            damage(path)
            split = next(s for s in ("train", "unseen") if env_virl.load_routes(path)[s])
            VIRL(data=path, split=split)  # without pictures all is well
            try:
                env = VIRL(data=path, split=split, vl=True, visual=visual)
                assert play, f"no error: {words}"
                for i in range(20):
                    messages = env.reset(i)[0]
                    while messages:
                        messages = env.step(env.expert()).messages
            except ValueError as e:
                message = str(e)
                assert isinstance(e, ValueError) and path in message and "\n" not in message and all(w in message for w in words), (words, message)
                assert len(message) < 500 and ids
            else:
                raise AssertionError(f"no error: {words}")

    def write(ending, content):
        def damage(path):
            for name in os.listdir(f"{path}/street_views"):
                if name.endswith(ending):
                    os.remove(f"{path}/street_views/{name}")
                    if content is not None:
                        with open(f"{path}/street_views/{name}", "wb") as f:
                            f.write(content)
        return damage

    def cut(path):  # the header is whole, the picture is not
        for name in os.listdir(f"{path}/street_views"):
            if name.endswith(".jpg"):
                with open(f"{path}/street_views/{name}", "rb+") as f:
                    f.truncate(1500)
    for content in (None, b"", b"junk", b"\xff\xd8\xff"):
        error(write(".jpg", content), "route ", "street_views/pano_", ".jpg: ")
    error(cut, "route ", "street_views/pano_", ".jpg: cannot be read", play=True)
    for content in (None, b"", b"{", b"\xff", b"[]", b"null", b"{}", b"[" * 100_000, b'{"rotation": "x"}', b'{"rotation": null}', b'{"rotation": true}',
                    b'{"rotation": NaN}', b'{"rotation": 1e999}', b'{"rotation": 400}', b'{"rotation": [1]}', b"9" * 5000):
        error(write(".metadata.json", content), "route ", "street_views/pano_", ".metadata.json: rotation: ")
    error(lambda path: os.remove(f"{path}/gps_pano_mapping.pkl"), "route ", "gps_pano_mapping.pkl")
    error(lambda path: None, "ood", "visual", visual="ood")
    routes = [virl_route(k) for k in (1, 3)]
    error(lambda path: write_virl(path, routes), "route ", "gps_pano_mapping.pkl: geocode (", "20 m")  # at places only, not between
    up = {tuple(x + k / 6 * (y - x) for x, y in zip(a, b)): "../x" for r in routes for line in [r["route_results"]["geocode_list"]]
          for a, b in zip(line, line[1:]) for k in range(7)}
    error(lambda path: write_virl(path, routes, up), "route ", "'../x' is no panorama id")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures through the model. GeneralPoints-VL on tiny random checkpoints of the families that users bring.

class QwenProcessor:
    """Stands in for Qwen2.5-VL's processor, which needs torchvision: its own Pillow half for pictures, the text by hand."""

    def __init__(self, tok):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        self.tokenizer, self.image_processor = tok, Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)

    def __call__(self, text, images, **_):
        out, place = self.image_processor(images, return_tensors="pt"), "<|image_pad|>"
        parts = text[0].split(place)
        assert len(parts) == len(images) + 1
        text = "".join(part + place * n for part, n in zip(parts, [grid.prod().item() // 4 for grid in out["image_grid_thw"]] + [0]))
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        return {**ids, **out, "mm_token_type_ids": (ids["input_ids"] == self.tokenizer.convert_tokens_to_ids(place)).long()}


VISION_FAMILIES = ("llava", "mllama", "idefics3", "qwen2_5_vl")


@functools.lru_cache(maxsize=None)
def tiny_vlm(family):
    """A random tiny vision-language model, saved and loaded again -> (model, tokenizer with .processor)."""
    from transformers import (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, MllamaConfig, MllamaForConditionalGeneration,
                              MllamaProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    torch.manual_seed(0)
    model, tok = sft.build_tiny(GeneralPoints, 0, vl=family == "llava")
    special = {"llava": [], "mllama": ["<|python_tag|>", "<s>", "<|image|>"], "idefics3": ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"],
               "qwen2_5_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]}[family]
    tok.add_special_tokens({"additional_special_tokens": special})
    place = {"mllama": "<|image|>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"}.get(family, "<image>")
    tok.chat_template = sft.CHAT_TEMPLATE.replace("<image>", place)
    ids = dict(zip(special, tok.convert_tokens_to_ids(special)))
    text = dict(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=1024, pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, image_size=40)
    if family == "mllama":
        tok.bos_token = "<s>"
        tok.processor = MllamaProcessor(MllamaImageProcessorPil(size={"height": 40, "width": 40}, max_image_tiles=2), tok, tok.chat_template)
        assert ids["<|image|>"] == len(tok) - 1  # as in the real one, the mark is in the embedding and not in the head
        model = MllamaForConditionalGeneration(MllamaConfig(
            image_token_index=ids["<|image|>"], text_config=dict(text, vocab_size=len(tok) - 1, cross_attention_layers=[1], bos_token_id=ids["<s>"],
                                                                 rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
            vision_config=dict(vision, num_global_layers=1, attention_heads=2, patch_size=20, max_num_tiles=2, vision_output_dim=64,
                               intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]])))
        for name, p in model.named_parameters():  # closed gates, as at initialisation, let no picture through
            p.data.fill_(0.5) if "gate" in name and "proj" not in name else None
    elif family == "idefics3":
        images = Idefics3ImageProcessorPil(size={"longest_edge": 40}, max_image_size={"longest_edge": 40}, do_image_splitting=False)
        tok.processor = Idefics3Processor(images, tok, image_seq_len=4, chat_template=tok.chat_template)
        model = Idefics3ForConditionalGeneration(Idefics3Config(
            image_token_id=ids["<image>"], scale_factor=2, pad_token_id=tok.pad_token_id, text_config=dict(text, model_type="llama"),
            vision_config=dict(vision, num_attention_heads=2, patch_size=10)))
    elif family == "qwen2_5_vl":
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
            text_config=dict(text, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}),
            vision_config=dict(depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=64, fullatt_block_indexes=[0]),
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"]))
    with torch.no_grad():  # samples shall vary, and depend on what stood before
        for p in model.parameters():
            p.mul_(1.5 if p.ndim == 2 else 1.0)
    model.generation_config.eos_token_id = [tok.eos_token_id, *range(300, 330)]
    with folder() as path:
        ev.save(f"{path}/m", model, tok, {})
        loaded, tok = ev.load(f"{path}/m")
    assert type(loaded) is type(model) and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    if family == "qwen2_5_vl":  # without torchvision there is a reason in the processor's place, and an error for who wants to show pictures
        if isinstance(tok.processor, str):
            try:
                ev.prompt(tok, *GeneralPoints(vl=True).reset(0))
                raise AssertionError("no error")
            except SystemExit as e:
                assert "processor cannot be loaded" in e.code, e.code
        tok.processor = QwenProcessor(tok)
    return loaded, tok


def seen_episodes(family, n=6, temperature=1.0, verify=3, **keywords):
    """Random multi-turn episodes of GeneralPoints-VL."""
    model, tok = tiny_vlm(family)
    torch.manual_seed(1)
    envs = [GeneralPoints(vl=True, verify=verify, rule="id" if i % 2 else "ood", **keywords) for i in range(n)]
    return ev.rollout(model, tok, envs, [f"t{i}" for i in range(n)], temperature, 16, cpu())


def picture_places(model, segment):
    ids = model.config.image_token_id if hasattr(model.config, "image_token_id") else model.config.image_token_index
    return [i for i, t in enumerate(segment.ids) if t == ids]


def test_vl_sampled_is_scored():
    """With a picture, in all families: generate()'s log-probs equal score()'s; several turns; batches of unequal prompts."""
    for family in VISION_FAMILIES:
        model, tok = tiny_vlm(family)
        for temperature in (1.0, 0.7):
            kept, generate = [], type(model).generate

            def spy(self, **kw):
                kw["generation_config"].return_dict_in_generate = kw["generation_config"].output_scores = True
                out = generate(self, **kw)
                kept.append((kw["input_ids"].shape[0], out.sequences[:, kw["input_ids"].shape[1]:], torch.stack(out.scores, 1).log_softmax(-1)))
                return out.sequences
            type(model).generate = spy
            try:
                episodes = seen_episodes(family, 5, temperature)
            finally:
                type(model).generate = generate
            assert len(kept) == 3 and all(len(e.segments) == 1 for e in episodes), "three turns in one conversation each"
            at, active = [0] * 5, list(range(5))  # episode -> number of action tokens read so far
            logps = [ev.score(model, [e.segments[0]], tok.pad_token_id, cpu(), temperature)[0].detach() for e in episodes]
            for turn, (rows, said, scores) in enumerate(kept):
                active = [i for i in active if len(episodes[i].turns) > turn]
                assert rows == len(active)
                for b, i in enumerate(active):
                    n = episodes[i].turns[turn]["tokens"]
                    sampled = scores[b, range(n), said[b, :n]]
                    assert (logps[i][at[i]:at[i] + n] - sampled).abs().max() < 2e-4, (family, turn, (logps[i][at[i]:at[i] + n] - sampled).abs().max())
                    at[i] += n


def test_vl_the_picture_matters_and_padding_does_not():
    for family in VISION_FAMILIES:
        model, tok = tiny_vlm(family)
        segments = [e.segments[0] for e in seen_episodes(family, 4)]
        head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1)
        together = ev.score(model, segments, tok.pad_token_id, cpu(), 1.0, head)
        alone = [ev.score(model, [s], tok.pad_token_id, cpu(), 1.0, head) for s in segments]
        for i in range(3):
            assert close(together[i].detach(), torch.cat([a[i] for a in alone]).detach(), 1e-4), family
        loss = sft.sft_loss(model, segments, 10, tok.pad_token_id, cpu()).item()
        assert close(loss, sum(sft.sft_loss(model, [s], 10, tok.pad_token_id, cpu()).item() for s in segments), 1e-4)
        swapped = [ev.Segment(s.ids, s.action, s.reward, segments[i - 1].pictures) for i, s in enumerate(segments)]
        other = ev.score(model, swapped, tok.pad_token_id, cpu())[0]
        assert (other - together[0]).abs().max() > 1e-3, f"{family} does not see its pictures"


def test_vl_masks_and_turns():
    """No image place is an action or has loss; what was said is decoded back; a later turn begins with the earlier ids and keeps the picture."""
    for family in VISION_FAMILIES:
        model, tok = tiny_vlm(family)
        check_later_turns(model, tok, lambda: seen_episodes(family, 1))
        messages, images = GeneralPoints(vl=True, rule="ood").reset("t0")  # that of seen_episodes
        told = ev.prompt(tok, messages, images).pictures
        assert told and same(seen_episodes(family, 1)[0].segments[0].pictures, told)
        for e in seen_episodes(family, 3):
            [segment], places = e.segments, picture_places(model, e.segments[0])
            assert places and not any(segment.action[i] for i in places) and segment.pictures["pixel_values"].shape[0] >= 1
            said = [t for t, a in zip(segment.ids, segment.action) if a]
            assert sum(segment.action) == len(said) == sum(t["tokens"] for t in e.turns)
            env = GeneralPoints(vl=True)
            messages, images = env.reset(0)
            row = sft.demonstration_row(tok, model, messages, images, env.expert())
            places = picture_places(model, row)
            assert places and not any(row.action[i] for i in places) and row.ids[:len(row.ids) - sum(row.action)] == ev.prompt(tok, messages, images).ids
            step = env.step("nonsense")
            later = ev.prompt(tok, step.messages, step.images).ids
            first = ev.prompt(tok, messages, images).ids
            nonsense = tok("nonsense", add_special_tokens=False).input_ids
            assert later == first + nonsense + ev.glue_ids(tok, step.messages), family


def test_vl_only_answers_move_the_loss():
    """Zero gradient at the logits of everything but answers, image places included."""
    for family in VISION_FAMILIES:
        model, tok = tiny_vlm(family)
        [segment], kept = seen_episodes(family, 1)[0].segments, []
        hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: (logits.retain_grad(), kept.append(logits))[0])
        try:
            for loss in (lambda: ev.score(model, [segment], 0, cpu())[0].sum(), lambda: sft.sft_loss(model, [segment], 1, 0, cpu())):
                loss().backward()
                touched = kept[-1].grad[0].abs().sum(-1) > 0
                assert touched.tolist() == [bool(a) for a in segment.action[1:]] + [False], family
        finally:
            hook.remove()
            model.zero_grad()


def test_vl_two_ranks():
    """With pictures too; and where one rank's rows have none, so that its eyes get no gradient of their own."""
    model, tok = tiny_vlm("llava")
    torch.manual_seed(0)
    seen = [e.segments[0] for e in seen_episodes("llava", 3)]
    words = ev.rollout(model, tok, [GeneralPoints(verify=2) for _ in range(5)], range(5), 1.0, 16, cpu())
    same_gradients(model, "llava", seen + [e.segments[0] for e in words])


def test_vl_mixed_precision_branches():
    """bf16, and fp16 with an enabled loss scaler, take real steps with pictures; weights stay fp32 and the eyes learn."""
    model, tok = tiny_vlm("llava")
    for dtype in ("bf16", "fp16"):
        with folder() as out:
            ev.save(f"{out}/m", model, tok, {})
            before = weights(f"{out}/m")
            for main, name in ((sft.main, "sft"), (rl.main, "rl")):
                quiet(main, ["--init", f"{out}/m", "--vl", "--out", out, "--tokens", "1e9", "--steps", "2", "--batch", "4", "--dtype", dtype] + SMALL)
                after = weights(f"{out}/gp-vl/id-id/{name}")
                assert all(v.dtype == torch.float32 for v in after.values())
                changed = [k for k in after if not torch.equal(before[k], after[k])]
                assert any("vision" in k for k in changed) and any("language" in k for k in changed), (dtype, name)


def test_vl_model_families():
    """--model with --vl takes other families through init, PPO and the table, and what is saved is loaded again."""
    for family in ("mllama", "idefics3"):
        model, tok = tiny_vlm(family)
        with folder() as out:
            ev.save(f"{out}/m", model, tok, {})
            text = quiet(rl.main, ["--model", f"{out}/m", "--vl", "--pixels", "40", "--out", out, "--init_tokens", "1e3", "--tokens", "1e9", "--steps", "1",
                                   "--batch", "4", *SMALL])
            assert "parts read right" in text and "base" in text
            trained, its = ev.load(f"{out}/gp-vl/id-id/rl")
            assert type(trained) is type(model) and ev.eyes(its) is not None and not same(trained.state_dict(), model.state_dict())


def test_vl_damaged_processor():
    """Of a checkpoint whose processor is damaged, pictures give one line with its name, and tasks in words still run."""
    model, tok = tiny_vlm("llava")
    for damage in ("{ no json", '{"image_processor_type": "Unheard"}', None):
        with folder() as out:
            ev.save(f"{out}/m", model, tok, {})
            files = [f for f in os.listdir(f"{out}/m") if "processor" in f]
            assert files
            for file in files:
                os.remove(f"{out}/m/{file}")
                if damage:
                    with open(f"{out}/m/{file}", "w") as f:
                        f.write(damage)
            message = error_of(rl.main, ["--init", f"{out}/m", "--vl", "--out", out] + SMALL)
            assert "processor cannot be loaded" in message, message
            loaded, words = ev.load(f"{out}/m")
            assert isinstance(words.processor, str)
            assert ev.rollout(loaded, words, [GeneralPoints(verify=1)], [0], 1.0, 4, cpu())[0].turns


def test_vl_models_do_tasks_in_words():
    """A vision-language model plays the task in words: no picture is passed, prompts have no image place."""
    for family in VISION_FAMILIES:
        model, tok = tiny_vlm(family)
        torch.manual_seed(0)
        episodes = ev.rollout(model, tok, [GeneralPoints(verify=2) for _ in range(3)], range(3), 1.0, 8, cpu())
        segments = [e.segments[0] for e in episodes]
        assert all(not s.pictures and not picture_places(model, s) for s in segments)
        assert torch.isfinite(ev.score(model, segments, tok.pad_token_id, cpu())[0]).all()


def test_vl_processor_round_trip():
    """The tiny model's processor from disk: same ids, same pixels, 16 places a picture; pixels follow the picture."""
    _, tok = tiny_vlm("llava")
    fresh = sft.build_tiny(GeneralPoints, 0, vl=True)[1]
    for i in range(3):
        messages, images = GeneralPoints(vl=True).reset(i)
        a, b = ev.prompt(tok, messages, images), ev.prompt(fresh, messages, images)
        assert a.ids == b.ids and torch.equal(a.pictures["pixel_values"], b.pictures["pixel_values"])
        assert a.pictures["pixel_values"].shape == (1, 3, 80, 80) and a.ids.count(tok.convert_tokens_to_ids("<image>")) == 16
        plain = torch.tensor(list(images[0].tobytes())).view(80, 80, 3).permute(2, 0, 1) / 255
        flat = [(a.pictures["pixel_values"][0, c].flatten(), plain[c].flatten()) for c in range(3)]
        assert all(torch.corrcoef(torch.stack(pair))[0, 1] > 0.999 for pair in flat)  # normalised, nothing else


def test_vl_pretraining_rows():
    """Pictures stand where their rows say, in order; their places have no loss; both kinds of documents occur."""
    for env in (GeneralPoints, VIRL):
        model, tok = sft.build_tiny(env, 0, vl=True)
        image, rng = tok.convert_tokens_to_ids("<image>"), random.Random(0)
        rows = sft.pretraining_rows(env, tok, rng, 12, 256, picture_share=0.5)
        counts = [r.ids.count(image) / 16 for r in rows]
        assert [r.pictures["pixel_values"].shape[0] if r.pictures else 0 for r in rows] == counts and sum(counts) > 6
        assert all([bool(a) for a in r.action[1:]] == [t != image for t in r.ids[1:]] and len(r.ids) <= 256 for r in rows)
        assert torch.isfinite(sft.sft_loss(model, rows, 100, tok.pad_token_id, cpu()))


def test_vl_command_line():
    """Both tasks with pictures, from an empty folder: base -> init -> PPO -> the table with the other look and with recognition; then SFT."""
    for env, words in (("gp", "black suits"), ("virl", "cities by day")):
        with folder() as out:
            small = ["--env", env, "--vl", "--visual", "id", "--out", out, "--episodes", "2", "--monitor_episodes", "2", "--monitors", "1",
                     "--max_new_tokens", "6", "--verify", "1"]
            text = quiet(rl.main, ["--base_tokens", "2e4", "--init_tokens", "2e3", "--tokens", "1e9", "--steps", "1", "--batch", "4", "--minibatches",
                                   "1", *small])
            for part in ("visual OOD", words, "parts read right", "pictures read right", "--vl --visual id", "recognized"):
                assert part in text, part
            [first] = [r for r in records(f"{out}/{env}-vl/id-id/rl") if "reward" in r]
            assert first["ratio_error"] < 1e-5 and first["kl1"] == 0 and 0 <= first["recognized"] <= 1
            cells = json.load(open(f"{out}/{env}-vl/id-id/rl/eval.json"))
            assert cells["vl"] and cells["trained_visual"] == "id" and set(cells["rows"][0]["visual"]["recognition"]) == {"p", "se", "n", "whole"}
            if env == "virl":  # the rest is the same code for both, and routes take time
                continue
            for steps in (1, 2):  # stopped, and resumed with its two groups of rates and its processor
                quiet(sft.main, ["--tokens", "1e9", "--steps", str(steps), "--batch", "2", *small] + ["--resume"] * (steps - 1))
            quiet(sft.main, ["--tokens", "1e9", "--steps", "2", "--batch", "2", "--name", "straight", *small])
            assert same(weights(f"{out}/{env}-vl/id-id/sft"), weights(f"{out}/{env}-vl/id-id/straight"))
            words = quiet(ev.main, ["--env", env, "--out", out, "--models", f"{out}/{env}-vl/id-id/rl", "--episodes", "2", "--max_new_tokens", "6"])  # it does the task in words too
            assert "visual OOD" not in words and "rl  " in words
            assert "visual" in error_of(ev.main, ["--env", env, "--out", out, "--visual", "ood"])
            assert "--pixels 80" in (e := error_of(ev.main, ["--env", env, "--vl", "--out", out, "--pixels", "120"])), e
            assert "it needs --vl" in error_of(ev.main, ["--pixels", "80"])
            assert "reads text alone" in error_of(rl.main, [*small, "--init", copy_of_init(out) + "/gp/id/init", "--name", "blind"])


# ----------------------------------------------------------------------------------------------------------------------

def main(names):
    tests = [(n, f) for n, f in sorted(globals().items()) if n.startswith("test_") and any(x in n for x in names or [""])]
    if not tests:
        sys.exit(f"error: no test has {' or '.join(names)} in its name")
    failed, begun = [], time.perf_counter()
    for name, test in tests:
        start = time.perf_counter()
        try:
            test()
            print(f"ok    {name}  {time.perf_counter() - start:.1f} s", flush=True)
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            failed.append(name)
            print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{time.perf_counter() - begun:.0f} s" + "".join(f"\nfailed: {name}" for name in failed))
    print(f"{len(tests) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
