"""eval.py: a model plays an environment. Chat to tokens, rollouts, scores, success rates, the ID/OOD table.

    python eval.py --env gp                                    # base, init, sft and rl under out/gp, rule id
    python eval.py --env gp --rule ood --models out/gp/ood/init out/gp/ood/rl --episodes 1000
    python eval.py --env gp --verify 1 --temperature 0.2       # one attempt, the paper's sampling temperature
    python eval.py --env gp --vl --visual id                   # cards in pictures: one more column

Columns (paper, section 5.1): seen = episodes trained on, ID = unseen episodes under the trained rule, OOD =
unseen episodes under the held-out rule. With --vl also visual OOD = unseen episodes, trained rule, the other
look. Success = solved within --verify attempts; errors: one standard error. "First" = by the first attempt.
KL = KL(model || init), nats per first answer on ID prompts, by the model's own samples. File: eval.json.

Departures from the paper: sampling at T = 1 (the paper: 0.2); 300 episodes a cell (the paper: 234); ID
episodes are unseen (the paper's ID is our "seen").
"""
import argparse
import gc
import inspect
import json
import math
import os
import re
import shlex
import shutil
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor,
                          AutoTokenizer, GenerationConfig, logging as hf_logging)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VLMS

from env_gp import GeneralPoints
from env_virl import VIRL, DataError

ENVS = {"gp": GeneralPoints, "virl": VIRL}  # a new environment: one class (see env_gp.py) and one entry

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------------------
# From chat to tokens. What the model said is never tokenised again: text -> ids is not unique, and PPO must
# score the very tokens that were sampled.

@dataclass
class Segment:
    """One conversation as tokens. ids, action_mask and reward have one entry per token.

        ids     <user> Make 24 ... <assistant> {"cards" ... } <end> <user> Wrong ... <assistant> { ... } <end>
        mask    0      0    0  0   0           1        1   1 1     0      0     0   0           1 1   1 1
        reward  0      0    0  0   0           0        0   0 -1    0      0     0   0           0 0   0 5

    pictures: {name: tensor}, what the processor made of the images (for LLaVA pixel_values [images, 3, H,
    W]); {} without images. The rest belongs to rl.py: one entry per action token, [n] each."""
    ids: list
    action_mask: list = field(default_factory=list)
    reward: list = field(default_factory=list)
    pictures: dict = field(default_factory=dict)
    logp: torch.Tensor = None       # of the policy that sampled
    ref_logp: torch.Tensor = None   # of the frozen reference
    value: torch.Tensor = None      # V(s_t) when it was sampled
    advantage: torch.Tensor = None  # from gae()
    whitened: torch.Tensor = None   # the same with mean 0 and variance 1 over the batch
    returns: torch.Tensor = None    # advantage + value

    def add(self, ids, action):
        """Append ids. action: 1 if the model said them, else 0; also for earlier ids that have none yet."""
        self.ids = self.ids + ids
        self.action_mask += [action] * (len(self.ids) - len(self.action_mask))
        self.reward += [0.0] * (len(self.ids) - len(self.reward))


MARK = "@@ANSWER@@"
TODAY = "26 Jul 2024"  # for chat templates that state the date: a prompt must not change overnight


def chat_text(tok, messages, images=(), **options):
    """A conversation in the chat template's words. With a processor, images stand before the first user's
    text. A template that lets its model think before it answers is asked not to."""
    if callable(tok.processor):
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        user = next(m for m in messages if m["role"] == "user")
        user["content"] = [{"type": "image"}] * len(images) + user["content"]
    try:
        return tok.apply_chat_template(messages, tokenize=False, date_string=TODAY, enable_thinking=False,
                                       **options)
    except Exception as e:  # a template may raise anything
        fail(f"the model's chat template does not take this conversation: {first_line(e)}")


def encode(tok, text, images):
    """-> Segment of a text with the processor's marks for images. ids hold all the places of each image.
    A text begins with the BOS token once, if the tokenizer uses one, whether or not the template wrote it."""
    if tok.bos_token and tok("").input_ids[:1] == [tok.bos_token_id] and not text.startswith(tok.bos_token):
        text = tok.bos_token + text
    if not images:
        return Segment(tok(text, add_special_tokens=False).input_ids)
    if not callable(tok.processor):
        fail(f"--vl: the model's processor cannot be loaded: {tok.processor}" if tok.processor else
             "--vl needs a vision-language model, and this one reads text alone")
    inputs = dict(tok.processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt"))
    del inputs["attention_mask"]
    return Segment(inputs.pop("input_ids")[0].tolist(), pictures=inputs)


def prompt(tok, messages, images=()):
    """-> Segment of a conversation up to where the assistant begins to speak, none of it an action."""
    segment = encode(tok, chat_text(tok, messages, images, add_generation_prompt=True), images)
    segment.add([], 0)
    return segment


def ids_after_mark(tok, messages, **options):
    """Ids of what the chat template writes after MARK, which stands in the place of an answer."""
    text = chat_text(tok, messages, **options)
    if MARK not in text:
        fail("the model's chat template leaves out what the assistant said")
    return tok(text.rpartition(MARK)[2], add_special_tokens=False).input_ids


def glue_ids(tok, messages, last_id=None):
    """Ids between an answer and the next one: end of turn, feedback, "assistant:". messages: [..., assistant,
    user]. last_id: the end of turn if the model has said it, which is not repeated; None if it was cut off.

        said   ... 24 " }  <|end|>        glue   <|user|> The formula ... <|end|> <|assistant|>
        cut    ... 24 " }                 glue   <|end|> <|user|> The formula ... <|end|> <|assistant|>"""
    marked = messages[:-2] + [{"role": "assistant", "content": MARK}] + messages[-1:]
    ids = ids_after_mark(tok, marked, add_generation_prompt=True)
    return ids[ids.index(last_id) + 1:] if last_id in ids[:2] else ids  # [:2]: some put a space before it


def answer_ids(tok, model, messages, text):
    """Ids of a demonstration: the answer and the token that ends a turn in this chat template."""
    closing = ids_after_mark(tok, messages + [{"role": "assistant", "content": MARK}])[:2]
    eos = model.generation_config.eos_token_id
    return tok(text, add_special_tokens=False).input_ids + [next((i for i in closing if i in eos), eos[0])]


def demonstrations(env, seed, writer="expert"):
    """The expert plays one episode -> [(messages, images, answer), ...], one a state. writer: see --demos."""
    messages, images = env.reset(seed)
    states = []
    while messages:
        states.append((messages, images, env.expert(writer)))
        step = env.step(states[-1][-1])
        messages, images = step.messages, step.images
    return states


def longest_answer(tok, model, args, path):
    """Default of --max_new_tokens: 1.25 x the longest of 64 demonstrations, in this tokenizer's tokens, and
    room for the words that a model from elsewhere may put before it."""
    env = make(args, rule=args.rule)
    longest = max(len(answer_ids(tok, model, messages, answer))
                  for seed in range(64) for messages, _, answer in demonstrations(env, seed))
    return longest * 5 // 4 + (128 if from_elsewhere(path) else 0)


PER_TOKEN = ("cross_attention_mask", "mm_token_type_ids", "token_type_ids")  # [1, tokens of the prompt, ...]


def collate(segments, pad_id, device, left=False):
    """Pad on the right or left -> model inputs (ids, mask [B, T] long; pictures), action_mask [B, T] bool.
    Pictures are joined along their first dimension (images, or patches). PER_TOKEN is padded as the ids are,
    and tokens behind the prompt repeat its last entry."""
    def padded(rows, pad=0):
        return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=pad,
                            padding_side="left" if left else "right").to(device)
    inputs = {"input_ids": padded([s.ids for s in segments], pad_id),
              "attention_mask": padded([[1] * len(s.ids) for s in segments])}
    for name in dict.fromkeys(name for s in segments for name in s.pictures):
        parts = [(s.pictures[name], len(s.ids)) for s in segments if name in s.pictures]
        if name in PER_TOKEN:
            inputs[name] = padded([x[0, torch.arange(n).clamp(max=x.shape[1] - 1)] for x, n in parts])
        else:
            inputs[name] = torch.cat([x for x, _ in parts]).to(device)
    return inputs, padded([s.action_mask for s in segments]).bool()


# ------------------------------------------------------------------------------------------------------------
# Rollout: sequential revision (paper, section 3). Model answers, verifier judges, its words join the prompt.

@dataclass
class Episode:
    segments: list = field(default_factory=list)  # conversations, in order
    turns: list = field(default_factory=list)     # per answer: its info + {"text", "tokens", "reward", "cut"}
    forwarded: int = 0  # tokens through the model while sampling; a later turn reads all before it again

    def positions(self):
        """The turns grouped by position: [[turn, ...], ...]. A hand is one position, a route has many."""
        groups = [[]]
        for turn in self.turns:
            groups[-1].append(turn)
            if turn["position_done"]:
                groups.append([])
        return groups[:-1]


def batch_size(segments, max_new_tokens):
    """Rows of a generate() call: 256, or as many as fit: 131,072 tokens, 2^28 numbers in pictures."""
    width = max(len(s.ids) for s in segments) + max_new_tokens
    pictures = max(sum(x.numel() for x in s.pictures.values()) for s in segments)
    return max(1, min(256, 2 ** 17 // width, 2 ** 28 // max(1, pictures)))


@torch.no_grad()
def rollout(model, tok, envs, seeds, temperature, max_new_tokens, run, keep_pictures=True):
    """Play one episode in each environment -> list of Episodes, in the order of envs.

    Sampling is plain: temperature (0: greedy), no top-k, no top-p, by torch's global generator. Prompts are
    padded on the left. Environments that are done leave the batch. run: device, ranks and precision, from
    setup(). keep_pictures: False drops those of finished conversations but the first's, for kl_to()."""
    model.eval()
    lend(model, True)  # --shard: all weights here while sampling
    ends = set(model.generation_config.eos_token_id)
    config = GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or None, top_k=0, top_p=1.0,
        max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=tok.pad_token_id,
        suppress_tokens=model.generation_config.suppress_tokens)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    playing = []  # (environment, its episode, the messages so far)
    for env, seed in zip(envs, seeds):
        messages, images = env.reset(seed)
        playing.append((env, Episode([prompt(tok, messages, images)]), messages))
    episodes = [episode for _, episode, _ in playing]
    while playing:
        still, size = [], batch_size([e.segments[-1] for _, e, _ in playing], max_new_tokens)
        for start in range(0, len(playing), size):
            part = playing[start:start + size]
            inputs, _ = collate([e.segments[-1] for _, e, _ in part], tok.pad_token_id, run.device, True)
            width = inputs["input_ids"].shape[1]
            if width + max_new_tokens > limit:
                fail(f"the model's context of {limit} tokens is too short: {width} of conversation + "
                     f"{max_new_tokens} of answer; lower --verify or --max_new_tokens")
            try:
                with run.amp():
                    out = model.generate(**inputs, generation_config=config, synced_gpus=False)
            except RuntimeError as e:  # what torch.multinomial() says of NaN, on the CPU and on CUDA
                if "probability tensor" in str(e) or "device-side assert" in str(e):
                    fail(f"the model's logits are not finite: it cannot be sampled from (dtype {run.dtype}); "
                         "checkpoints saved before are intact")
                raise
            for (env, episode, messages), row in zip(part, out[:, width:].tolist()):
                stop = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
                said = row[:stop]                        # the end token, if any, is an action too
                cut = said[-1] not in ends
                text = tok.decode(said if cut else said[:-1], skip_special_tokens=False)
                segment = episode.segments[-1]
                segment.add(said, 1)
                step = env.step(text)
                episode.forwarded += len(segment.ids)
                segment.reward[-1] = step.reward         # on the turn's last action token
                episode.turns.append({**step.info, "text": text, "tokens": stop, "reward": step.reward,
                                      "cut": cut})
                if not keep_pictures and step.info["position_done"] and len(episode.segments) > 1:
                    segment.pictures = {}
                if step.done:
                    continue
                still.append((env, episode, step.messages))
                if step.messages[:len(messages)] == messages:   # the conversation goes on
                    segment.add(glue_ids(tok, step.messages, None if cut else said[-1]), 0)
                else:                                           # a fresh one begins
                    episode.segments.append(prompt(tok, step.messages, step.images))
        playing = still
    lend(model, False)
    return episodes


# ------------------------------------------------------------------------------------------------------------
# Scores: the log-probabilities of what was said, for PPO and the KL column.

def micro_batches(segments, budget):
    """Cut segments, shortest first, into lists of at most `budget` tokens, padding included, or one segment.

        lengths 9 3 4 3, budget 10   ->   [3 3] [4] [9]"""
    part = []
    for s in sorted(segments, key=lambda s: len(s.ids)):
        if part and len(s.ids) * (len(part) + 1) > budget:
            yield part
            part = []
        part.append(s)
    if part:
        yield part


def forward(model, segments, pad_id, run, **options):
    """Run a model over a batch of segments -> (output, its logits at the positions that score an action token
    [N, V], those positions [B, T] bool, the action tokens [N]).

    Token t is scored by position t - 1. With ids  p0 p1 a2 a3 f4 a5  and mask 0 0 1 1 0 1, positions 1, 2
    and 4 are kept and score a2, a3 and a5. No other position gets logits: [B, T, V] would not fit."""
    inputs, action_mask = collate(segments, pad_id, run.device)
    keep = torch.nn.functional.pad(action_mask[:, 1:], (0, 1))              # [B, T], the last one False
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    with run.amp():
        out = model(**inputs, use_cache=False, **options)
    logits = out.logits if out.logits.ndim == 2 else out.logits[keep]       # [N, V]; some make them all
    return out, logits.float(), keep, inputs["input_ids"][:, 1:][action_mask[:, 1:]]


def score(model, segments, pad_id, run, temperature=1.0, value_head=None, entropy_grad=True):
    """What the model thinks of the action tokens of some segments, and of no others, in reading order -> logp
    [N], entropy [N], value [N] (None without a head), in fp32.

    Logits are divided by the sampling temperature: this is the distribution that was sampled from.
    entropy_grad: False where no gradient goes through the entropy, whose graph would cost [N, V] more."""
    out, logits, keep, said = forward(model, segments, pad_id, run,
                                      output_hidden_states=value_head is not None)
    logits = logits / temperature                                           # [N, V]
    unsaid = model.generation_config.suppress_tokens or []                  # rollout() does not sample these
    if unsaid:
        logits = logits.index_fill(1, torch.tensor(unsaid, device=run.device), -1e9)
    logprobs = logits.log_softmax(-1)                                       # [N, V]
    logp = logprobs.gather(-1, said[:, None])[:, 0]                         # [N]
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)                      # [N]
    if value_head is None:
        return logp, entropy, None
    return logp, entropy, value_head(out.hidden_states[-1][keep].float())[:, 0]


# ------------------------------------------------------------------------------------------------------------
# Success rates.

def rate(hits):
    """List of 0/1 -> {"p", "se", "n"}, se binomial as in the paper (for shares in [0, 1] an upper bound)."""
    n, p = len(hits), sum(hits) / max(1, len(hits))
    return {"p": p, "se": math.sqrt(p * (1 - p) / max(1, n)), "n": n}


@torch.no_grad()
def kl_to(reference, model, tok, episodes, args, run):
    """KL(model || reference), nats per first answer, by the model's own samples: mean summed log-ratio."""
    firsts, total = [], 0.0
    for e in episodes:  # the first conversation, cut after its first answer
        s = e.segments[0]
        end = s.action_mask.index(1) + e.turns[0]["tokens"]
        firsts.append(Segment(s.ids[:end], s.action_mask[:end], pictures=s.pictures))
    for part in micro_batches(firsts, args.micro_tokens or 2048):
        logp, ref_logp = (score(m, part, tok.pad_token_id, run, args.temperature or 1.0)[0]
                          for m in (model, reference))
        total += (logp - ref_logp).sum().item()
    total, count = all_sum([total, len(firsts)], run)
    return total / count


def paper_answers(positions):
    """The answers of an episode that the paper counts, 1 = right. Every answer is a sample, second attempts
    too. The episode ends at the first position whose attempts ran out (evaluation here goes on behind it).

        right at once; wrong, wrong; right at once   ->   1 0 0"""
    counted = []
    for turns in positions:
        counted += [int(turn["position_solved"]) for turn in turns]
        if not counted[-1]:
            break
    return counted


def evaluate(model, tok, args, run, episodes, reference=None):
    """Success rates of a model in the columns of the table -> {column: {...}}, each with
        "p", "se", "n"   share of positions (hands; steps of a route) solved within the attempts
        "first"          ... by the first attempt                    "episode"  share of whole episodes solved
        "matters"        {"p", ..., "first"} of only the positions at which the two rules differ
        "paper"          the paper's counting, paper_answers()
        "other_rule"     share of first answers that follow the other rule, among those positions
        "verdicts"       shares among first answers                  "kl"       in "id", given a reference
        "recognition"    with pictures, by first answers: share of a picture's parts read right; "whole": of
                         pictures read right as a whole; "solved": of those, by the first attempt
    The same episodes for every model and seed: they depend on the episode's number only."""
    def solved(among):
        return {**rate([turns[-1]["position_solved"] for turns in among]),
                "first": rate([turns[0]["position_solved"] for turns in among])}
    cells = {}
    for column, keywords in columns(args).items():
        torch.manual_seed(1_000_003 * (args.seed + 1) + run.rank)
        fixed = getattr(make(args, **keywords), "fixed_routes", None)
        mine = range(run.rank, fixed or episodes, run.world)  # each rank plays its share
        played = rollout(model, tok, [make(args, **keywords, **({"route": i} if fixed else {})) for i in mine],
                         [f"eval/{i}" for i in mine], args.temperature, args.max_new_tokens, run,
                         keep_pictures=False)
        routes = sum(of_all_ranks([e.positions() for e in played], run), [])
        positions = [turns for route in routes for turns in route]
        differing = [turns for turns in positions if turns[0]["rule_matters"]]
        verdicts = [turns[0]["verdict"] for turns in positions]
        shown = [turns[0] for turns in positions if turns[0].get("recognized") is not None]
        cells[column] = {
            **solved(positions), "matters": solved(differing), "kl": None,
            "episode": rate([route[-1][-1]["success"] for route in routes]),
            "paper": rate([right for route in routes for right in paper_answers(route)]),
            "other_rule": rate([turns[0]["other_rule"] for turns in differing]),
            "verdicts": {v: verdicts.count(v) / len(verdicts) for v in sorted(set(verdicts))}}
        if shown:
            cells[column]["recognition"] = {
                **rate([turn["recognized"] for turn in shown]),
                "whole": rate([turn["recognized"] == 1 for turn in shown]),
                "solved": rate([turn["position_solved"] for turn in shown if turn["recognized"] == 1])}
        if column == "id" and reference is not None:
            cells[column]["kl"] = (0.0 if reference is model
                                   else kl_to(reference, model, tok, played, args, run))
    return cells


# ------------------------------------------------------------------------------------------------------------
# The table.

HEADS = {"seen": "seen", "id": "ID", "ood": "OOD", "visual": "visual OOD"}
measured = {}  # {a checkpoint's absolute path: its cells}, of models that a loop has measured in this command


def columns(args):
    """{column of the table: the environment's keywords}. With --data "visual" needs its folder ood."""
    keywords = ENVS[args.env].cells(args.rule, args.visual)
    if args.data and args.visual == "id" and not os.path.isdir(os.path.join(args.data, "ood")):
        keywords.pop("visual")
    return keywords


def print_table(rows, args):
    env, names = ENVS[args.env], [c for c in HEADS if c in rows[0]]
    blocks = {"": lambda cell: cell}  # a block's title: from a column's dict to the rate shown
    if any(0 < row["ood"]["matters"]["n"] < row["ood"]["n"] for row in rows):
        blocks.update({"where the rules differ": lambda cell: cell["matters"],
                       "whole episodes": lambda cell: cell["episode"],
                       "the paper's counting": lambda cell: cell["paper"]})
    if "recognition" in rows[0]["id"]:
        blocks.update({"parts read right": lambda cell: cell["recognition"],
                       "pictures read right": lambda cell: cell["recognition"]["whole"],
                       "solved if read right": lambda cell: cell["recognition"]["solved"]})
    counts = dict.fromkeys(str(rows[0][c]["episode"]["n"]) for c in names)  # --data may have a fixed number
    other = "ood" if args.rule == "id" else "id"
    print(f"\n{env.title}: trained rule = {args.rule} ({env.rule_names[args.rule]}), held out = {other} "
          f"({env.rule_names[other]})"
          + (f"; trained look = {args.visual} ({args.data or env.visual_names[args.visual]})"
             if args.vl else "")
          + f"\nsuccess in %, ± one standard error; {' or '.join(counts)} episodes a cell, T = "
          f"{args.temperature:g}, within {args.verify or env.default_verify} attempts")
    for title, pick in blocks.items():
        firsts = [c for c in names[1:] if "first" in pick(rows[0]["id"])]
        heads = [HEADS[c] + " *" * (c == "id") for c in names]
        heads += [f"{HEADS[c].removesuffix(' OOD')} first" for c in firsts]
        print(f"{title:22}|" + "".join(f"{head:^13}|" for head in heads)
              + ("" if title else f"{'OOD by trained rule':^21}|{'KL to init':^11}"))
        for row in rows:
            rates = [pick(row[c]) for c in names] + [pick(row[c])["first"] for c in firsts]
            rates += [] if title else [row["ood"]["other_rule"]]
            texts = [f"{100 * r['p']:5.1f} ± {100 * r['se']:3.1f}" for r in rates]
            kl = "" if title or row["id"]["kl"] is None else f"{row['id']['kl']:.2f}"
            widths = [13] * (len(names) + len(firsts)) + [21]
            print(f"{row['name']:22}|" + "".join(f"{t:^{w}}|" for t, w in zip(texts, widths)) + f"{kl:^11}")
    print("* the trained rule. seen = episodes trained on; ID, OOD = unseen ones. first: by the first "
          "attempt, as with --verify 1.\n  OOD by trained rule: first answers on the held-out rule that "
          "follow the trained one."
          + "\n  the paper's counting: every answer is a sample, and a route ends where its attempts run out."
          * ("the paper's counting" in blocks)
          + "\n  visual OOD: unseen episodes, trained rule, other look. read: by first answers, where the "
            "prompt does not tell." * args.vl, flush=True)


def table(paths, args, run):
    """Evaluate checkpoints, print the table -> the dict that eval.json holds. paths: {name: path}. The model
    named init, if there, is the reference of the KL column. What is in `measured` is not played again."""
    gc.collect()  # see place()
    reference, reference_tok = load(paths["init"], run.device, run.weights) if "init" in paths else (None, [])
    rows = []
    for name, path in tqdm(paths.items(), desc="evaluate", disable=run.rank > 0 or None, leave=False):
        cells = measured.get(os.path.abspath(path))
        if cells is None:
            if args.vl:
                same_flags(path, args, ["pixels"])
            model = None  # the last row's goes before the next one comes
            model, tok = (reference, reference_tok) if name == "init" else load(path, run.device, run.weights)
            longest = args.max_new_tokens or longest_answer(tok, model, args, path)  # in its tokens
            comparable = len(tok) == len(reference_tok)  # one vocabulary: KL exists
            cells = evaluate(model, tok, SimpleNamespace(**{**vars(args), "max_new_tokens": longest}), run,
                             args.episodes, reference if comparable else None)
        rows.append({"name": name, "path": path, **cells})
    if run.rank == 0:
        print_table(rows, args)
    return {"env": args.env, "vl": args.vl, "trained_rule": args.rule, "trained_visual": args.visual,
            "verify": args.verify or ENVS[args.env].default_verify, "temperature": args.temperature,
            "episodes": args.episodes, "seed": args.seed, "rows": rows}


# ------------------------------------------------------------------------------------------------------------
# Plumbing, the same for all three scripts. First: bad input, flags, devices and ranks.

def fail(message):
    """Bad input: one line on stderr, exit code 1, nothing already saved is touched."""
    raise SystemExit(f"error: {message}")


def first_line(error):
    """The first line of what an exception says, or its name."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def new_parser(doc):
    parser = argparse.ArgumentParser(description=doc, usage="%(prog)s [flags]    (--help lists them)",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--env", choices=ENVS, default="gp")             # the task: GeneralPoints or V-IRL
    add("--data", metavar="DIR")                         # virl: the released routes for the procedural city
    add("--rule", choices=["id", "ood"], default="id")   # the rule trained on; the other one is held out
    add("--vl", action="store_true")                     # see cards or streets in a picture, not in words
    add("--visual", choices=["id", "ood"])               # with --vl: the look trained on, default id
    add("--pixels", type=int)                            # with --vl: a picture's side; default: 80, or 1200
    add("--model", metavar="PATH")                       # a transformers checkpoint for the tiny base
    add("--out", metavar="DIR", default="out")           # everything made here goes below this folder
    add("--seed", type=int, default=0)                   # fixes demonstrations, samples and initial weights
    add("--verify", type=int)                            # attempts per position; default: gp 5, virl 2
    add("--temperature", type=float, default=1.0)        # of sampling; 0 = greedy (evaluation only)
    add("--max_new_tokens", type=int)                    # per answer; default: see longest_answer()
    add("--micro_tokens", type=int)                      # per forward pass when not sampling, with padding
    add("--device")                                      # cpu | cuda | cuda:1 ...; default: cuda if there
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")  # of autocast; trained in fp32
    add("--episodes", type=int, default=300)             # per cell of the final table
    return parser


LIMITS = {"seed": (0, 2 ** 31 - 1), "temperature": (0, 100), "gamma": (0, 1), "lam": (0, 1), "beta": (0, 1e9),
          "coef_value": (0, 1e9), "coef_entropy": (0, 1e9), "lr": (1e-12, 1e30), "clip": (1e-9, 1e9),
          "tokens": (1e-9, 1e30)}  # of flags that are numbers; all others are whole numbers from 1 on


def parse(parser, argv):
    """Flags -> namespace. A number out of its range is an error that names the flag."""
    args = parser.parse_args(argv)
    for name, given in vars(args).items():
        low, high = LIMITS.get(name, (1, math.inf))
        if type(given) in (int, float) and not low <= given <= high:
            parser.error(f"argument --{name}: {given} is not between {low:g} and {high:g}")
    if (args.visual or args.pixels) and not args.vl:
        parser.error("arguments --visual and --pixels describe pictures: they need --vl")
    args.data = args.data and os.path.normpath(args.data)  # a flag that counts: DIR/ is DIR
    if args.vl:
        args.visual = args.visual or "id"
    models = getattr(args, "models", [])  # eval.py's; None: all that are found
    models = found_checkpoints(args).values() if models is None else models
    args.from_elsewhere = any(map(from_elsewhere, [args.model, getattr(args, "init", None), *models]))
    if args.vl:
        args.pixels = args.pixels or (1200 if args.from_elsewhere else 80)
    return args


def script(main):
    """Run a script's main(): trouble with files ends in one line, Ctrl-C without a traceback."""
    try:
        main()
    except (OSError, torch.OutOfMemoryError, DataError) as e:
        fail(first_line(e))
    except KeyboardInterrupt:
        raise SystemExit(130)
    if dist.is_initialized():  # only here: a rank that fails must not wait for the others in this call
        dist.destroy_process_group()


def setup(args):
    """Device, ranks, precision -> namespace. CUDA: bf16, or fp16 with a loss scaler; else fp32."""
    world, rank, local = (int(os.environ.get(name, default)) for name, default in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {name}: {first_line(e)}")
    shard = getattr(args, "shard", False)
    if shard and world == 1:
        fail("--shard spreads a model over several ranks: torchrun --nproc_per_node=2 ... --shard")
    if world > 1 and not dist.is_initialized():  # the others wait as long while rank 0 saves a large model
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    if args.dtype != "auto":
        dtype, why = args.dtype, "--dtype"
    elif device.type != "cuda":
        dtype, why = "fp32", f"{device.type} gains little from less"
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, why = "bf16", "this GPU supports it"
    else:
        dtype, why = "fp16", "this GPU lacks bf16; with a loss scaler"
    if shard and dtype == "fp16":
        fail("--shard goes with bf16 or fp32: the ranks' loss scalers would differ")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return SimpleNamespace(
        device=device, dtype=dtype, why=why, rank=rank, world=world, sharded=False,
        weights=torch.float32 if dtype == torch.float16 else dtype,  # of frozen models; fp16's range is small
        amp=lambda: torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext(),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16))


def of_all_ranks(x, run):
    """Any x of each rank -> [rank 0's, rank 1's, ...], on all ranks."""
    ranks = [x] * run.world
    if run.world > 1:
        dist.all_gather_object(ranks, x)
    return ranks


def all_sum(values, run):
    """Sum a list of numbers over all ranks -> list of floats."""
    return [float(sum(numbers)) for numbers in zip(*of_all_ranks(values, run))]


def say(run, *words):
    if run.rank == 0:
        with tqdm.external_write_mode():  # above the bars
            print(*words, flush=True)


def make(args, **keywords):
    """The environment of --env. What it cannot use (say, damaged --data) ends in one line."""
    given = dict(seed=args.seed, data=args.data, verify=args.verify or ENVS[args.env].default_verify)
    if args.vl:
        given.update(vl=True, visual=args.visual, pixels=args.pixels)
    try:
        return ENVS[args.env](**{**given, **keywords})
    except ValueError as e:
        fail(e)


# ------------------------------------------------------------------------------------------------------------
# Plumbing, second: where runs live, and checkpoints: a transformers folder + trainer.pt, replaced at once.

def trained_on(args):
    """Folder of the runs trained on --rule and, with --vl, --visual: out/gp/id, or out/gp-vl/id-ood."""
    return os.path.join(args.out, args.env + "-vl" * args.vl, args.rule + f"-{args.visual}" * args.vl)


def base_of(args):
    """Folder of the tiny base. With pictures each look has its own, which knows the other look poorly."""
    return os.path.join(os.path.dirname(trained_on(args)), "base-ood" if args.visual == "ood" else "base")


def found_checkpoints(args):
    """{name: path} of the usual stages below --out that exist, in the order they are trained."""
    places = {"base": args.model or base_of(args),
              **{stage: os.path.join(trained_on(args), stage) for stage in ("init", "sft", "rl")}}
    return {name: path for name, path in places.items() if path == args.model or checkpoint_at(path)}


def task_flags(args, tokens=None):
    """The flags that name the task and the model, for "next: ..." lines."""
    given = {name: getattr(args, name, None)
             for name in ("visual", "pixels", "out", "seed", "data", "model", "init", "verify")}
    given["tokens"] = tokens and f"{tokens:g}"
    named = [f" --{name} {shlex.quote(str(x))}" for name, x in given.items() if x not in (None, "out", 0)]
    return f"--env {args.env} --rule {args.rule}" + " --vl" * args.vl + "".join(named)


def checkpoint_at(path):
    """The checkpoint at `path` or in its checkpoint/. Undoes a save killed between its two renames."""
    for folder in (os.path.join(path, "checkpoint"), path):
        if not os.path.isdir(folder) and os.path.isfile(os.path.join(folder + ".old", "config.json")):
            with suppress(FileNotFoundError):  # another rank was faster
                os.rename(folder + ".old", folder)
        if os.path.isfile(os.path.join(folder, "config.json")):
            return folder
    return None


FALLBACK_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")


def load(path, device="cpu", dtype=torch.float32):
    """-> (model in eval mode, tokenizer). path: our folder, or any folder or OWNER/NAME of the hub. dtype:
    of the weights, fp32 for a model that is trained.

    tok.processor is a vision-language model's processor, a callable, or None. If that needs a package that is
    not here (torchvision for Qwen2.5-VL), it is the reason, a str: tasks in words still run.
    model.generation_config keeps only the end and padding ids and suppress_tokens: a released model's top-p
    or repetition penalty would make what is sampled differ from what PPO scores."""
    folder = checkpoint_at(path)
    if folder is None and (path.count("/") != 1 or os.path.exists(os.path.dirname(path))):
        fail(f"no checkpoint at {path!r}: no config.json there")
    try:
        vision = AutoConfig.from_pretrained(folder or path).model_type in VLMS
        processor = load_processor(folder or path) if vision else None
        tok = getattr(processor, "tokenizer", None) or AutoTokenizer.from_pretrained(folder or path)
        tok.chat_template = getattr(processor, "chat_template", None) or tok.chat_template  # with pictures
        kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model, report = kind.from_pretrained(folder or path, dtype=dtype, output_loading_info=True,
                                             ignore_mismatched_sizes=True)  # they are named below
        vocabulary = model.get_output_embeddings().out_features
    except Exception as e:  # transformers, safetensors, tokenizers: each its own kinds for a damaged file
        fail(f"cannot load a model from {path!r}: {first_line(e)}")
    lost = sorted({*report["missing_keys"], *(str(name) for name, *_ in report["mismatched_keys"])})
    if lost:
        fail(f"{path!r}: {len(lost)} weights are missing or have another shape than its config.json says, "
             f"{lost[0]} first")
    tok.processor = processor
    if isinstance(tok.chat_template, dict):  # several by name
        tok.chat_template = tok.chat_template.get("default")
    if tok.chat_template is None and vision:
        fail(f"{path!r}: no chat template in its processor"
             + (f", or out of reach: {processor}" if isinstance(processor, str) else ""))
    if tok.chat_template is None:
        print(f"{path}: its tokenizer has no chat template; using a plain 'user: ... assistant: ...' one",
              flush=True)
        tok.chat_template = FALLBACK_TEMPLATE
    tok.chat_template = re.sub(r"strftime_now\([^()]*\)", f"'{TODAY}'", tok.chat_template)
    # A turn may end as the model's files say, or as its chat template does: for a base model they differ.
    turn = ids_after_mark(tok, [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}])
    eos = {tok.eos_token_id, *torch.tensor(model.generation_config.eos_token_id or []).flatten().tolist()}
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    eos = sorted(eos - {None} | set(turn[:2]) & special)
    if not eos:
        fail(f"the tokenizer of {path!r} has no end-of-sequence token")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token or tok.convert_ids_to_tokens(eos[0])
    # The tokens that stand for pictures are not sampled: a later turn would look for a picture there.
    marks = {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")}
    suppressed = sorted(m for m in marks - {None} if m < vocabulary)  # Mllama's mark lies beyond
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tok.pad_token_id,
                                               suppress_tokens=suppressed or None)
    return model.to(device).eval(), tok


def load_processor(path):
    """The processor of a vision-language model, or a str with the reason why there is none here."""
    try:
        processor = AutoProcessor.from_pretrained(path)
        return processor if hasattr(processor, "image_processor") else f"{path} holds no image processor"
    except Exception as e:  # a package that is missing, a damaged file: each family raises its own kinds
        return first_line(e)


def save(path, model, tok, state, weights=None):
    """Write a checkpoint folder so that at every instant the old or the new one is whole: path.tmp in full,
    then path -> path.old, path.tmp -> path. state: for trainer.pt, tensors and plain values
    (weights_only). weights: in place of the model's own."""
    tmp, old = path + ".tmp", path + ".old"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        model.save_pretrained(tmp, state_dict=weights)
        (tok.processor if callable(tok.processor) else tok).save_pretrained(tmp)
        torch.save(state, os.path.join(tmp, "trainer.pt"))
        if hasattr(os, "sync"):  # not on Windows
            os.sync()            # on the disk before the renames, should the machine stop
        if os.path.isdir(path):  # else path.old, if any, is the only whole one
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(tmp, path)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as e:  # a full disk: OSError, RuntimeError or SafetensorError, depending on the writer
        fail(f"cannot save to {path}: {e}; the checkpoint saved before is intact")


def load_state(path, whole=False):
    """trainer.pt of a checkpoint, {} when it has none (a model from elsewhere). whole: its tensors are read.
    Else they have no content: an optimizer's state is twice as large as the model."""
    file = os.path.join(checkpoint_at(path) or path, "trainer.pt")
    if not os.path.isfile(file):
        return {}
    try:
        return torch.load(file, map_location="cpu" if whole else "meta", weights_only=True, mmap=not whole)
    except Exception as e:
        fail(f"{file} is damaged: {first_line(e)}")


def from_elsewhere(path):
    """Is it a user's model, or trained from one? The rest descends from the tiny base. None: that base."""
    flags = load_state(path).get("flags", {"from_elsewhere": True}) if path else {}
    return flags.get("from_elsewhere", False)


# Flags that may change at --resume, since they hardly change what is learnt. All others are saved with a run.
BOOKKEEPING = {"out", "name", "device", "dtype", "episodes", "monitors", "resume", "steps", "max_new_tokens",
               "micro_tokens", "activation_checkpointing", "shard"}


def same_flags(folder, args, only=None):
    """Fail, naming them, if a run was made with other flags (only: of these). --resume may raise --tokens."""
    old = load_state(folder).get("flags", {})
    free = BOOKKEEPING | {"tokens"} if getattr(args, "resume", False) else BOOKKEEPING
    other = [f"--{k} {old[k]}" for k in sorted(set(only or old) - free)
             if k in old and old[k] != getattr(args, k, old[k])]
    if other:
        fail(f"{folder} was made with {' '.join(other)}; for other values choose another --name or --out")


def write_json(path, content):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)
    os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------------------------------------
# Plumbing, last: --shard, PyTorch's FSDP2. Each rank holds its part of every weight (a DTensor), and so of
# gradient and AdamW's state, and borrows the others while a block computes. All ranks borrow together: one
# that runs a block which another one does not run waits for it for ever. The tiny base stays whole.

def place(model, run, dtype, sharded):
    """A model from the CPU to this rank's device: all of it, or sharded. dtype: of the weights borrowed."""
    run.sharded = sharded
    gc.collect()  # a sharded model refers to itself: without this the one before it stays in memory
    if not sharded:
        return model.to(run.device)
    names = getattr(model, "_no_split_modules", ["Linear"])  # a value head is one block
    blocks = [m for m in model.modules() if type(m).__name__ in (names or ())]
    if not blocks:
        fail(f"--shard: {type(model).__name__} does not name its blocks (_no_split_modules)")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # about changes in place; there are none here
    mesh = dist.init_device_mesh(run.device.type, (run.world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in dict.fromkeys([*reversed(blocks), model]):  # inner ones first: a unit takes what is left
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)          # a sum over the ranks; the default is the mean
        unit.set_force_sum_reduction_for_comms(True)  # or gloo refuses the line above


def lend(model, everything):
    """Before generate() all weights to all ranks, after it back: ranks may sample unequally many tokens."""
    for unit in (m for m in model.modules() if isinstance(m, FSDPModule)):
        unit.set_reshard_after_forward(not everything, recurse=False)
        if everything:
            unit.unshard()  # now, not when it is used: a rank may have no episode to play
        else:
            unit.reshard()


def in_step(parts, run):
    """Micro-batches -> [(micro-batch, weight), ...]. Sharded, ranks with fewer repeat one with weight 0."""
    parts = [(part, 1.0) for part in parts]
    if run.sharded:
        ranks = of_all_ranks((len(parts), {bool(s.pictures) for part, _ in parts for s in part}), run)
        if len(set.union(*(kinds for _, kinds in ranks))) > 1:  # a vision tower is not run without pictures
            fail("--shard: pictures must be in all conversations or in none")
        parts += [(parts[0][0], 0.0)] * (max(n for n, _ in ranks) - len(parts))
    return parts


def gathered(x, run):
    """Tensors in dicts and lists -> detached, on rank 0 the sharded ones whole. All ranks must call it."""
    @cache  # tied weights are one tensor under two names and stay one, which save_pretrained() asks for
    def whole(t):
        t = t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()
        return t.cpu() if run.rank == 0 else None
    return tree_map_only(torch.Tensor, whole, x)


def restore(optimizer, saved):
    """optimizer.load_state_dict(), which does not cut what was gathered to this rank's part."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, x in saved["state"].get(i, {}).items():
            if isinstance(p, DTensor) and name != "step":
                saved["state"][i][name] = distribute_tensor(x, p.device_mesh, p.placements)
    optimizer.load_state_dict(saved)


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", metavar="PATH")  # to compare; default: all stages found
    args = parse(parser, argv)
    run = setup(args)
    paths, home = found_checkpoints(args), os.path.dirname(trained_on(args))
    if args.models:
        names = [os.path.basename(os.path.normpath(p)) for p in args.models]
        paths = {n if names.count(n) == 1 else os.path.relpath(p, home): p
                 for n, p in zip(names, args.models)}
    if not paths:
        fail(f"no checkpoints under {home}; train one: python rl.py {task_flags(args)}")
    result = table(paths, args, run)
    if run.rank == 0:
        file = os.path.join(trained_on(args), "eval.json")
        write_json(file, result)
        print("written:", file)


if __name__ == "__main__":
    script(main)
