"""eval.py: a model plays an environment, and the table of its success: in distribution (ID) and out (OOD).

    python eval.py --env gp                                    # base, init, sft and rl under out/gp, rule id
    python eval.py --env gp --rule ood --models out/gp/ood/init out/gp/ood/rl --episodes 1000
    python eval.py --env gp --verify 1 --temperature 0.2       # one attempt, the paper's sampling temperature
    python eval.py --env gp --vl --visual id                   # cards in pictures: one more column

Columns (paper, section 5.1). seen: episodes of the training set. ID: unseen episodes under the trained rule.
OOD: unseen episodes under the held-out rule. With --vl also the other visual variation: unseen episodes under
the trained rule, with pictures of a kind that was not trained on. Success means solved within --verify
attempts. Errors are one standard error. eval.json holds these rates and many more: see evaluate().

Departures from the paper: we sample at T = 1 (the paper: 0.2), play 300 hands or 200 routes a cell (the
paper: 234 and 48), and our ID episodes are unseen (the paper's ID is our "seen").
"""
import argparse
import inspect
import json
import math
import os
import posixpath
import re
import shlex
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor,
                          AutoTokenizer, GenerationConfig, logging as hf_logging)
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VLMS

from env_gp import OTHER, GeneralPoints
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
    W]); {} without images. The other fields belong to rl.py and have one entry per action token, [n] each."""
    ids: list
    action_mask: list = field(default_factory=list)
    reward: list = field(default_factory=list)
    pictures: dict = field(default_factory=dict)
    logp: torch.Tensor = None       # of the policy that sampled
    ref_logp: torch.Tensor = None   # of the frozen reference
    value: torch.Tensor = None      # V(s_t) when it was sampled
    advantage: torch.Tensor = None  # from gae()
    whitened: torch.Tensor = None   # the advantage with mean 0 and variance 1 over the batch
    returns: torch.Tensor = None    # advantage + value

    def add(self, ids, action):
        """Append ids. action: 1 if the model said them, else 0; also for earlier ids without a mask."""
        self.ids = self.ids + ids
        self.action_mask += [action] * (len(self.ids) - len(self.action_mask))
        self.reward += [0.0] * (len(self.ids) - len(self.reward))


MARK = "@@ANSWER@@"
TODAY = "26 Jul 2024"  # for chat templates that state the date: a prompt must not change overnight


def chat_text(tok, messages, images=(), **options):
    """A conversation in the chat template's words -> str. Images stand before the first user's text. Some
    templates take a message only as a list of parts and drop plain text, so for a text model both forms are
    tried. Thinking is switched off, if the template has such a switch. tok.processor: see load()."""
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    user = next(m for m in parts if m["role"] == "user")
    user["content"] = [{"type": "image"}] * len(images) + user["content"]
    troubles = []
    for form in [parts] if callable(tok.processor) else [messages, parts]:
        try:
            text = tok.apply_chat_template(form, tokenize=False, date_string=TODAY, enable_thinking=False,
                                           **options)
        except Exception as e:  # a template may raise anything
            troubles.append(first_line(e))
            continue
        if messages[-1]["content"].strip() in text:
            return text
        troubles.append("it leaves out what was said")
    fail(f"the chat template of {tok.name_or_path!r} does not take this conversation: {troubles[0]}")


def encode(tok, text, images):
    """-> Segment of a text with marks for images. ids have as many placeholder tokens as each image needs.
    A text begins with the BOS token once, if the tokenizer uses one, whether or not the template wrote it."""
    if tok.bos_token and tok("").input_ids[:1] == [tok.bos_token_id] and not text.startswith(tok.bos_token):
        text = tok.bos_token + text
    if not images:
        return Segment(tok(text, add_special_tokens=False).input_ids)
    if not callable(tok.processor):
        fail(f"--vl: the model's processor cannot be loaded: {tok.processor}" if tok.processor else
             "--vl needs a vision-language model, and this one reads only text")
    inputs = dict(tok.processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt"))
    del inputs["attention_mask"]
    return Segment(inputs.pop("input_ids")[0].tolist(), pictures=inputs)


def around_answer(tok, messages):
    """What the chat template writes before and after the last answer of a conversation -> (str, str).
    messages: [..., assistant], or [..., assistant, user]; then the second str ends where an answer begins.

    All answers are replaced by MARK: some templates take answers apart and some refuse them, but the text
    around an answer must not depend on what the model said."""
    marked = [{**m, "content": MARK} if m["role"] == "assistant" else m for m in messages]
    text = chat_text(tok, marked, add_generation_prompt=messages[-1]["role"] == "user")
    before, mark, behind = text.rpartition(MARK)
    if not mark:
        fail(f"the chat template of {tok.name_or_path!r} leaves out what the assistant said")
    return before, behind


class TurnForm(NamedTuple):
    """How a chat template writes an answer. Special tokens end a turn; a list is [] where none does.

                    header or blank                   last                  between
        most                                          <|end|>               <|end|>
        some        a space                           a newline, <|end|>    a newline, <|end|>
        gpt-oss     <|channel|> final <|message|>     <|return|>            <|end|>
        GLM-4       a newline                                               <|user|>, of the next turn"""
    opened: str      # what only a prompt ends with, and no finished conversation has: an opened <think>
    header: str      # words between a prompt and an answer: a part of the prompt, so the model cannot choose
    blank: str       # blanks in that place: a part of the answer, for `` {`` may be one token
    last: list       # ids behind an answer, up to the end of the turn, where the conversation ends there
    between: list    # the same, where a user's turn follows
    asked: str       # a short prompt with its header
    asked_ids: list  # the same as ids


@lru_cache(maxsize=8)
def turn_form(tok, template):
    """-> TurnForm. template: tok.chat_template, only for the cache: a tokenizer may get another one."""
    user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}
    asked = chat_text(tok, [user], add_generation_prompt=True)
    before, last = around_answer(tok, [user, answer])
    _, between = around_answer(tok, [user, answer, user])
    common = os.path.commonprefix([asked, before])
    special = {i for i, token in tok.added_tokens_decoder.items() if token.special}
    ends = []  # each text up to its first special token; behind `between`'s second token it is the user's
    for text, longest in ((last, None), (between, 2)):
        ids = tok(text, add_special_tokens=False).input_ids[:longest]
        ends.append(next((ids[:n + 1] for n, token in enumerate(ids) if token in special), []))
    header, opened = before[len(common):], asked[len(common):]
    header, blank = (header, "") if header.strip() else ("", header)
    asked += header
    return TurnForm(opened, header, blank, *ends, asked, tok(asked, add_special_tokens=False).input_ids)


def prompt(tok, messages, images=()):
    """-> Segment of a conversation up to where the assistant begins to speak, none of it an action."""
    text = chat_text(tok, messages, images, add_generation_prompt=True)
    segment = encode(tok, text + turn_form(tok, tok.chat_template).header, images)
    segment.add([], 0)
    return segment


def glue_ids(tok, messages, last_id=None):
    """Ids between an answer and the next one -> [int]: end of turn, feedback, "assistant:".
    messages: [..., assistant, user]. last_id: the end token if the model has said one (a turn ends once),
    None if the answer was cut off.

        said   ... 24 " }  <|end|>        glue   <|user|> The formula ... <|end|> <|assistant|>
        cut    ... 24 " }                 glue   <|end|> <|user|> The formula ... <|end|> <|assistant|>"""
    form = turn_form(tok, tok.chat_template)
    ids = tok(around_answer(tok, messages)[1] + form.header, add_special_tokens=False).input_ids
    # Without `last` a turn ends with the next role's mark. If the model has said another end, the mark stays.
    ended = last_id is not None and (form.last or form.between[-1:] == [last_id])
    return ids[len(form.between):] if ended else ids


def answer_ids(tok, model, text):
    """Ids of a demonstration -> [int]: the answer, up to the token that ends a turn in this chat template. It
    is tokenised behind a prompt, because some tokenizers (Llama 2's) put a blank before a text of its own."""
    form = turn_form(tok, tok.chat_template)
    ids = tok(form.asked + form.blank + text, add_special_tokens=False).input_ids
    if ids[:len(form.asked_ids)] == form.asked_ids:
        ids = ids[len(form.asked_ids):]
    else:  # a token would hold the end of the prompt and the beginning of the answer
        ids = tok(form.blank + text, add_special_tokens=False).input_ids
    return ids + (form.last or form.between or model.generation_config.eos_token_id[:1])


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
# Rollout: sequential revision (paper, section 3). The model answers, the verifier judges, and its words join
# the prompt of the next attempt.

@dataclass
class Episode:
    segments: list = field(default_factory=list)  # conversations, in order
    turns: list = field(default_factory=list)     # per answer: its info + {"text", "tokens", "reward", "cut"}
    # cut: the answer ran into --max_new_tokens, or the model's context has no room for another one
    forwarded: int = 0  # tokens that went through the model while sampling

    def positions(self):
        """The turns grouped by position: [[turn, ...], ...]. A hand is one position, a route has many."""
        groups = [[]]
        for turn in self.turns:
            groups[-1].append(turn)
            if turn["position_done"]:
                groups.append([])
        return groups[:-1]


def batch_size(segments, max_new_tokens):
    """How many rows generate() gets: at most 256, and 131,072 tokens, and 2^28 numbers in pictures."""
    width = max(len(s.ids) for s in segments) + max_new_tokens
    pictures = max(sum(x.numel() for x in s.pictures.values()) for s in segments)
    return max(1, min(256, 2 ** 17 // width, 2 ** 28 // max(1, pictures)))


def context_tokens(model):
    """The longest conversation that a model takes, in tokens; infinite where its config.json names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_context(model, segments, max_new_tokens):
    """Fail if a model's context has no room for the longest of some prompts and an answer."""
    longest, limit = max((len(s.ids) for s in segments), default=0), context_tokens(model)
    if longest + max_new_tokens > limit:
        fail(f"the model's context of {limit} tokens is too short: {longest} of a prompt + {max_new_tokens} "
             "of an answer; lower --max_new_tokens")


def sampling(model, tok, temperature, max_new_tokens, **more):
    """generate()'s configuration: nothing but the temperature (0: greedy), without top-k and top-p."""
    return GenerationConfig(
        do_sample=temperature > 0, temperature=temperature or None, top_k=0, top_p=1.0,
        max_new_tokens=max_new_tokens, eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tok.pad_token_id, suppress_tokens=model.generation_config.suppress_tokens,
        return_dict_in_generate=True, **more)


class BufferedLayer(DynamicLayer):
    """The keys and values of a layer while sampling, [B, heads, T, head_dim] each. transformers' own class
    copies all of them for each new token: a quarter of a tiny model's rollout, more for long answers
    (results/log.md). This one has room for 64 tokens more. _layer_type: generate() puts it into its caches in
    place of that class."""
    _layer_type = "full_attention"
    buffers = None  # [keys, values], both with room at the end

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if (start and end <= self.buffers[0].shape[-2]
                and self.keys.data_ptr() == self.buffers[0].data_ptr()             # else rows were dropped
                and not (self.keys.requires_grad or key_states.requires_grad)):    # else autograd needs the old
            for buffer, new in zip(self.buffers, (key_states, value_states)):
                buffer[..., start:end, :] = new
        else:
            super().update(key_states, value_states)
            self.buffers = [torch.nn.functional.pad(x, (0, 0, 0, 64)) for x in (self.keys, self.values)]
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values


def generate(model, inputs, config, machine):
    """model.generate(), with one clear line for a model whose logits are not finite. machine: this process's
    device, dtype and rank, from setup()."""
    try:
        with machine.amp():
            return model.generate(**inputs, generation_config=config, synced_gpus=False)
    except RuntimeError as e:  # what torch.multinomial() says of NaN, on the CPU and on CUDA
        if "probability tensor" in str(e) or "device-side assert" in str(e):
            fail("the model's logits are not finite, so it cannot be sampled from (dtype "
                 f"{machine.dtype}); checkpoints saved before are intact")
        raise


@torch.no_grad()
def rollout(model, tok, envs, seeds, temperature, max_new_tokens, machine, keep_pictures=True):
    """Play one episode in each environment -> list of Episodes, in the order of envs.

    Sampling is plain: temperature (0: greedy), no top-k, no top-p, by torch's global generator. Prompts are
    padded on the left. Environments that are done leave the batch. Where the model allows it, the next
    attempt goes on from the cache of the last one. An episode ends early if the model's context has no room
    for another answer.
    keep_pictures: False drops the pictures of finished conversations, which only training needs."""
    model.eval()
    unshard(model)
    ends = set(model.generation_config.eos_token_id)
    config = sampling(model, tok, temperature, max_new_tokens)
    limit = context_tokens(model)
    episodes = [Episode([prompt(tok, *env.reset(seed))]) for env, seed in zip(envs, seeds)]
    players = list(zip(envs, episodes))
    check_context(model, [e.segments[0] for e in episodes], max_new_tokens)
    batches = [(players, None)] if players else []  # (players, inputs from continued(), None: read all)
    while batches:
        players, inputs = batches.pop()
        size = batch_size([e.segments[-1] for _, e in players], max_new_tokens)
        if len(players) > size:
            batches += [(players[size:], None), (players[:size], None)]
            continue
        # The columns that an earlier call has read or said: those of the cache, and the last token said.
        counted = inputs["cache"].get_seq_length() + 1 if inputs else 0
        inputs = inputs or collate([e.segments[-1] for _, e in players], tok.pad_token_id, machine.device,
                                   left=True)[0]
        mask, width = inputs["attention_mask"], inputs["input_ids"].shape[1]
        out = generate(model, inputs, config, machine)
        rows = zip(players, mask[:, counted:].sum(1).tolist(), out.sequences[:, width:].tolist())
        on = []  # those not done: (row, tokens said, its conversation's next ids or None, player)
        for i, ((env, episode), read, row) in enumerate(rows):
            stop = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            said = row[:stop]                               # the end token, if any, is an action too
            cut = said[-1] not in ends
            text = tok.decode(said if cut else said[:-1], skip_special_tokens=False)
            segment = episode.segments[-1]
            segment.add(said, 1)
            step = env.step(text)
            episode.forwarded += read + stop
            segment.reward[-1] = step.reward                # on the turn's last action token
            episode.turns.append({**step.info, "text": text, "tokens": stop, "reward": step.reward,
                                  "cut": cut})
            if step.info["position_done"] and not keep_pictures:
                segment.pictures = {}
            if step.done:
                continue
            if step.info["position_done"]:                  # a new conversation begins
                segment, glue = prompt(tok, step.messages, step.images), None
            else:
                glue = glue_ids(tok, step.messages, None if cut else said[-1])
            if len(segment.ids) + len(glue or []) + max_new_tokens > limit:
                episode.turns[-1].update(cut=True, position_done=True)
                continue                                    # no room for an answer: the episode ends here
            if glue is None:
                episode.segments.append(segment)
            else:
                segment.add(glue, 0)
            on.append((i, stop, glue, (env, episode)))
        if on:
            all_go_on = all(glue is not None for _, _, glue, _ in on)
            batches.append(([player for *_, player in on],
                            continued(model, out, inputs, on, tok.pad_token_id) if all_go_on else None))
    reshard(model)
    return episodes


def continued(model, out, inputs, on, pad_id):
    """Inputs with which generate() goes on from its cache, so that no conversation is read again -> dict, or
    None for a model that cannot: a sliding window, or a forward() without position_ids, would count masked
    gaps as tokens, and pictures other than LLaVA's have positions of their own. out: what generate() returned
    for `inputs`. on: (row, tokens said, glue, player) of those who go on.

        read, said, glue    p p a a e . . . g g g     . is a masked gap: answer and glue are padded
                            p p a a a a e g g g g"""
    cache, mask, width = out.cache, inputs["attention_mask"], inputs["input_ids"].shape[1]
    plain = all(type(layer) is BufferedLayer for layer in getattr(cache, "layers", None) or [None])
    plain = plain and "position_ids" in inspect.signature(model.forward).parameters
    plain = plain and "local" not in getattr(model.config, "attention_layers", ())  # GPT-Neo's windows
    if not plain or inputs.keys() - {"input_ids", "attention_mask", "cache", "pixel_values"}:
        return None
    rows = torch.tensor([i for i, *_ in on], device=mask.device)
    lengths = torch.tensor([[stop] for _, stop, *_ in on], device=mask.device)
    cache.batch_select_indices(rows)
    said = torch.arange(out.sequences.shape[1] - width, device=mask.device) < lengths
    glued, _ = collate([Segment(glue) for _, _, glue, _ in on], pad_id, mask.device, left=True)
    return {"input_ids": torch.cat([out.sequences[rows], glued["input_ids"]], 1), "cache": cache,
            "attention_mask": torch.cat([mask[rows], said.long(), glued["attention_mask"]], 1)}


# ------------------------------------------------------------------------------------------------------------
# Scores: the log-probabilities of what was said.

def forward(model, segments, pad_id, machine, **options):
    """Run a model over a batch of segments -> (output, its logits at the positions that score an action token
    [N, V] in fp32, those positions [B, T] bool, the action tokens [N]). options: more for the model.

    Token t is scored by position t - 1. With ids  p0 p1 a2 a3 f4 a5  and mask 0 0 1 1 0 1, positions 1, 2
    and 4 are kept and score a2, a3 and a5. No other position gets logits: [B, T, V] would not fit."""
    inputs, action_mask = collate(segments, pad_id, machine.device)
    keep = torch.nn.functional.pad(action_mask[:, 1:], (0, 1))              # [B, T], the last one False
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    with machine.amp():
        out = model(**inputs, use_cache=False, **options)
    logits = out.logits if out.logits.ndim == 2 else out.logits[keep]       # [N, V]; some make them all
    return out, logits.float(), keep, inputs["input_ids"][:, 1:][action_mask[:, 1:]]


def score(model, segments, pad_id, machine, temperature=1.0, value_head=None, entropy_grad=True):
    """Log-prob, entropy and value of each action token of some segments, in reading order -> logp [N],
    entropy [N], value [N] (None without a head), in fp32.

    Logits are divided by the sampling temperature: this is the distribution that was sampled from.
    entropy_grad: False if no gradient goes through the entropy; that saves a graph of [N, V]."""
    out, logits, keep, said = forward(model, segments, pad_id, machine,
                                      output_hidden_states=value_head is not None)
    logits = logits / temperature                                           # [N, V]
    never = model.generation_config.suppress_tokens or []                   # rollout() does not sample these
    if never:
        logits = logits.index_fill(1, torch.tensor(never, device=machine.device), -1e9)
    logprobs = logits.log_softmax(-1)                                       # [N, V]
    logp = logprobs.gather(-1, said[:, None])[:, 0]                         # [N]
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = -(logprobs.exp() * logprobs).sum(-1)                      # [N]
    if value_head is None:
        return logp, entropy, None
    return logp, entropy, value_head(out.hidden_states[-1][keep].float())[:, 0]


@torch.no_grad()
def scoring_error(model, tok, env, machine):
    """max |log-prob by generate() - log-prob by score()| of a few sampled tokens -> float. One of the two
    conversations is padded: some models see padding. Others (encoders) see what comes later."""
    model.eval()
    unshard(model)
    messages, images = env.reset(0)
    rows = [prompt(tok, messages, images), prompt(tok, messages, images)]
    rows[1].add(answer_ids(tok, model, env.expert("expert")), 0)
    inputs, _ = collate(rows, tok.pad_token_id, machine.device, left=True)
    plain = SimpleNamespace(**{**vars(machine), "amp": nullcontext})
    out = generate(model, inputs, sampling(model, tok, 1.0, 8, output_scores=True), plain)
    said = out.sequences[:, inputs["input_ids"].shape[1]:]                              # [2, 8]
    sampled = torch.stack(out.scores, 1).float().log_softmax(-1).gather(-1, said[..., None])[..., 0]
    reshard(model)
    for row, ids in zip(rows, said.tolist()):
        row.add(ids, 1)                            # also what follows an end: padding is scored like a word
    return (score(model, rows, tok.pad_token_id, plain)[0] - sampled.flatten()).abs().max().item()


def check_model(path, model, tok, env, max_new_tokens, machine):
    """Fail before a run has a folder if the model's context is too short, or if generate() and score() do not
    agree: its success and PPO's ratios would be wrong. Weights in bf16 are too coarse to tell."""
    check_context(model, [prompt(tok, *env.reset(0))], max_new_tokens)
    if model.dtype == torch.float32 and (machine.world == 1 or machine.dtype == torch.float32):
        if not (error := scoring_error(model, tok, env, machine)) <= 1e-3:  # also NaN
            fail(f"{path}: a token's log-prob by generate() and by score() differs by {error:.1e}: the model "
                 "sees padding, or what comes later; its success and PPO's ratios would be wrong")


# ------------------------------------------------------------------------------------------------------------
# Success rates.

def rate(hits):
    """List of 0/1 -> {"p", "se", "n"}, se binomial as in the paper (for shares in [0, 1] an upper bound)."""
    n, p = len(hits), sum(hits) / max(1, len(hits))
    return {"p": p, "se": math.sqrt(p * (1 - p) / max(1, n)), "n": n}


def paper_answers(positions):
    """The answers of an episode that count in the paper's metric, 1 = right -> [int]. Second attempts count
    too. The paper's episode ends at the first position whose attempts ran out; our evaluation goes on.

        right at once; wrong, wrong; right at once   ->   1 0 0"""
    counted = []
    for turns in positions:
        counted += [int(turn["position_solved"]) for turn in turns]
        if not counted[-1]:
            break
    return counted


def make(args, **keywords):
    """The environment of --env. What it cannot use (say, damaged --data) ends in one line."""
    given = dict(seed=args.seed, data=args.data, verify=args.verify or ENVS[args.env].default_verify)
    if args.vl:
        given.update(vl=True, visual=args.visual, pixels=args.pixels)
    try:
        return ENVS[args.env](**{**given, **keywords})
    except ValueError as e:
        fail(e)


def columns(args):
    """{column of the table: the environment's keywords}. With --data, "visual" needs the sub-folder ood."""
    keywords = ENVS[args.env].columns(args.rule, args.visual)
    if args.data and args.visual == "id" and not os.path.isdir(os.path.join(args.data, "ood")):
        keywords.pop("visual")
    return keywords


def evaluate(model, tok, args, machine, episodes):
    """Success rates of a model in the columns of the table -> {column: {...}}, each with
        "p", "se", "n"   share of positions (hands; steps of a route) solved within the attempts
        "first"          ... by the first attempt                    "episode"  share of whole episodes solved
        "matters"        {"p", ..., "first"} of only the positions at which the two rules differ
        "paper"          the paper's metric for routes, paper_answers()
        "other_rule"     share of first answers that follow the other rule, among those positions
        "verdicts"       shares among first answers
        "recognition"    with pictures, by first answers: share of a picture's parts read right; "whole": of
                         pictures read right as a whole; "solved": of those, by the first attempt
    The episodes are the same for every model and seed: they depend only on their number."""
    def solved(among):
        return {**rate([turns[-1]["position_solved"] for turns in among]),
                "first": rate([turns[0]["position_solved"] for turns in among])}
    plan = []  # (column, environment, seed) of this rank's share of each column's episodes
    for column, keywords in columns(args).items():
        fixed = getattr(make(args, **keywords), "fixed_routes", None)       # --data may have a fixed number
        plan += [(column, make(args, **keywords, **({"route": i} if fixed else {})), f"eval/{i}")
                 for i in range(machine.rank, fixed or episodes, machine.world)]
    torch.manual_seed(1_000_003 * (args.seed + 1) + machine.rank)
    played = rollout(model, tok, [env for _, env, _ in plan], [seed for *_, seed in plan], args.temperature,
                     args.max_new_tokens, machine, keep_pictures=False)     # all at once: large batches
    cells = {}
    for column in columns(args):
        mine = [episode.positions() for (c, *_), episode in zip(plan, played) if c == column]
        routes = sum(all_gather(mine, machine), [])
        positions = [turns for route in routes for turns in route]
        differing = [turns for turns in positions if turns[0]["rule_matters"]]
        verdicts = [turns[0]["verdict"] for turns in positions]
        shown = [turns[0] for turns in positions if turns[0].get("recognized") is not None]
        cells[column] = {
            **solved(positions), "matters": solved(differing),
            "episode": rate([route[-1][-1]["success"] for route in routes]),
            "paper": rate([right for route in routes for right in paper_answers(route)]),
            "other_rule": rate([turns[0]["other_rule"] for turns in differing]),
            "verdicts": {v: verdicts.count(v) / len(verdicts) for v in sorted(set(verdicts))}}
        if shown:
            cells[column]["recognition"] = {
                **rate([turn["recognized"] for turn in shown]),
                "whole": rate([turn["recognized"] == 1 for turn in shown]),
                "solved": rate([turn["position_solved"] for turn in shown if turn["recognized"] == 1])}
    return cells


# ------------------------------------------------------------------------------------------------------------
# The table.

def headings(args):
    """{column: its heading, with the rule that is in force there}."""
    heads = {"seen": "seen", "id": f"ID (rule {args.rule})", "ood": f"OOD (rule {OTHER[args.rule]})",
             "visual": "visual OOD"}
    return {column: heads[column] for column in columns(args)}


def summary(cells, args):
    """Success rates in one line -> str: "seen 0.91, ID (rule id) 0.48, OOD (rule ood) 0.36"."""
    text = ", ".join(f"{head} {cells[column]['p']:.2f}" for column, head in headings(args).items())
    if "recognition" in cells["id"]:
        text += f", read {cells['id']['recognition']['p']:.2f}"
    return text


def print_table(rows, args):
    """Print success; if the rules differ at only some positions, also success at those; with pictures, also
    how much of them was read. rows: [{"name", "path", column: what evaluate() returns, ...}, ...]."""
    env, heads = ENVS[args.env], headings(args)
    blocks = {"": None}  # a block's title: the key of its rate in what evaluate() returns for a column
    if any(0 < row["ood"]["matters"]["n"] < row["ood"]["n"] for row in rows):
        blocks["where the rules differ"] = "matters"
    if "recognition" in rows[0]["id"]:
        blocks["parts of pictures read"] = "recognition"
    counts = dict.fromkeys(str(rows[0][c]["episode"]["n"]) for c in heads)  # --data may have a fixed number
    print(f"\n{env.title}: trained on rule {args.rule} ({env.rule_names[args.rule]}), held out is rule "
          f"{OTHER[args.rule]} ({env.rule_names[OTHER[args.rule]]})")
    if args.vl:
        names = {"id": args.data, "ood": os.path.join(args.data, "ood")} if args.data else env.visual_names
        print(f"pictures: trained on {names[args.visual]}"
              + f"; visual OOD is {names[OTHER[args.visual]]}" * ("visual" in heads))
    print(f"success in %, ± one standard error; {' or '.join(counts)} episodes a cell, "
          f"T = {args.temperature:g}, within {args.verify or env.default_verify} attempts")
    for title, key in blocks.items():
        print(f"{title:22}|" + "".join(f"{head:^16}|" for head in heads.values()))
        for row in rows:
            rates = [row[column][key] if key else row[column] for column in heads]
            texts = [f"{100 * r['p']:5.1f} ± {100 * r['se']:3.1f}" for r in rates]
            print(f"{row['name']:22}|" + "".join(f"{text:^16}|" for text in texts))
    print("seen: episodes of the training set. All other columns: unseen episodes.", flush=True)


def table(paths, args, machine):
    """Evaluate checkpoints and print the table -> the dict that eval.json holds. paths: {name: path}."""
    rows, runs = [], {name: saved_args(path) for name, path in paths.items()}
    limits = [run.get("max_new_tokens", 0) for run in runs.values() if run.get("data") == args.data]
    args.max_new_tokens = args.max_new_tokens or max(limits, default=0) or 256  # alike in all rows
    for name, path in tqdm(paths.items(), desc="evaluate", disable=machine.rank > 0 or None, leave=False):
        run = runs[name]
        if args.vl and (run.get("pixels") or args.pixels) != args.pixels:
            fail(f"{path} was trained on pictures with --pixels {run['pixels']}, not {args.pixels}")
        for flag in ("env", "visual") + ("rule",) * (run.get("stage") != "base"):  # a base serves both rules
            trained, wanted = run.get(flag), getattr(args, flag)
            if trained and wanted and trained != wanted:
                print0(machine, f"{path} was trained on {flag} {trained}; the columns are of {flag} {wanted}")
        with in_turn(machine):
            model, tok = load(path, machine.device, machine.frozen)
        check_model(path, model, tok, make(args, **columns(args)["seen"]), args.max_new_tokens, machine)
        rows.append({"name": name, "path": path, **evaluate(model, tok, args, machine, args.episodes)})
        model = None  # before the next one comes
    if machine.rank == 0:
        print_table(rows, args)
    return {"env": args.env, "vl": args.vl, "trained_rule": args.rule, "trained_visual": args.visual,
            "verify": args.verify or ENVS[args.env].default_verify, "temperature": args.temperature,
            "episodes": args.episodes, "seed": args.seed, "rows": rows}


# ------------------------------------------------------------------------------------------------------------
# Below here nothing is about evaluation. First: bad input, flags, devices and ranks, for all three scripts.

def fail(message):
    """Bad input: one line on stderr, exit code 1, nothing already saved is touched."""
    raise SystemExit(f"error: {message}")


def first_line(error):
    """The first line of what an exception says, with the next one if it ends in a colon; or its name."""
    first, *others = (str(error).strip() or repr(error)).splitlines()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


def number(low, high=math.inf, kind=int):
    """An argparse type: a number from low to high."""
    def convert(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return kind(text)
    convert.__name__ = kind.__name__  # for argparse's own message: "invalid int value: 'many'"
    return convert


def new_parser(doc):
    """The flags that all three scripts share."""
    parser = argparse.ArgumentParser(description=doc, usage="%(prog)s [flags]", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("the task").add_argument
    add("--env", choices=ENVS, default="gp", help="GeneralPoints or V-IRL (default: gp)")
    add("--rule", choices=["id", "ood"], default="id",
        help="the rule that is trained; the other one is held out, for the OOD column (default: id)")
    add("--vl", action="store_true", help="cards or streets are shown in a picture, not told in words")
    add("--visual", choices=["id", "ood"],
        help="with --vl: the visual variation that is trained; the other one is held out (default: id)")
    add("--pixels", type=number(1), metavar="N",
        help="with --vl: a picture's side (default: 80; with a model of yours 1200)")
    add("--verify", type=number(1), metavar="N", help="attempts per position (default: gp 5, virl 2)")
    add("--data", type=os.path.normpath, metavar="DIR",
        help="with --env virl: the authors' released routes; default: our own city")
    add = parser.add_argument_group("models and files").add_argument
    add("--model", type=posixpath.normpath, metavar="PATH",  # DIR/ is DIR, and OWNER/NAME stays on Windows
        help="a transformers checkpoint, a folder or OWNER/NAME of the hub, in place of the tiny base")
    add("--out", type=posixpath.normpath, metavar="DIR", default="out",
        help="everything made goes below this folder (default: out)")
    add("--seed", type=number(0, 2 ** 31 - 1), default=0, metavar="N",
        help="fixes initial weights, demonstrations and samples (default: 0)")
    add = parser.add_argument_group("sampling and evaluation").add_argument
    add("--temperature", type=number(0, 100, float), default=1.0, metavar="T",
        help="of sampling; 0 is greedy, for evaluation only (default: 1)")
    add("--max_new_tokens", type=number(1), metavar="N",
        help="an answer's longest length (default: gp 32, virl 17, with --data or a model of yours 256)")
    add("--episodes", type=number(0), metavar="N",
        help="per cell of the final table; 0: no table (default: 300 hands or 200 routes)")
    add = parser.add_argument_group("device").add_argument
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="of autocast; weights are trained in fp32 (default: on CUDA bf16 or fp16, else fp32)")
    return parser


def parse(parser, argv, saved=None):
    """Flags -> namespace. saved: a namespace whose values count where argv says nothing (--resume)."""
    args = parser.parse_args(argv, saved)
    if (args.visual or args.pixels) and not args.vl:
        parser.error("arguments --visual and --pixels describe pictures: they need --vl")
    if args.vl and not hasattr(ENVS[args.env], "visual_names"):
        parser.error(f"argument --vl: {ENVS[args.env].title} has no pictures")
    if args.episodes is None:
        args.episodes = 200 if args.env == "virl" else 300  # a route has eight positions, a hand is one
    if args.vl:
        args.visual = args.visual or "id"
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
        # FSDP2 keeps gloo's threads alive. One that lets go of a tensor while Python ends may abort it.
        time.sleep(1)


def setup(args):
    """Device, ranks and precision of this process -> namespace, called machine everywhere. CUDA: bf16, or
    fp16 where bf16 is missing; else fp32. amp(): the one autocast context. frozen: the dtype of the weights
    of models that are not trained (fp16's range is too small for some)."""
    world, rank, local = (int(os.environ.get(name, default)) for name, default in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # set by torchrun
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {name}: {first_line(e)}")
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
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return SimpleNamespace(
        device=device, dtype=dtype, why=why, rank=rank, world=world,
        frozen=torch.float32 if dtype == torch.float16 else dtype,
        amp=lambda: torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext())


def all_gather(x, machine):
    """Any x of each rank -> [rank 0's, rank 1's, ...], on all ranks."""
    ranks = [x] * machine.world
    if machine.world > 1:
        dist.all_gather_object(ranks, x)
    return ranks


def all_sum(values, machine):
    """Sum a list of numbers over all ranks -> list of floats."""
    return [float(sum(numbers)) for numbers in zip(*all_gather(list(values), machine))]


@contextmanager
def in_turn(machine):
    """The ranks run the block one after another, so that host memory holds one whole model at a time."""
    for _ in range(machine.rank):
        all_gather(None, machine)
    try:
        yield
    finally:  # a bad file fails on every rank in its turn: one clear line from each, no traceback
        for _ in range(machine.rank, machine.world):
            all_gather(None, machine)


def unshard(model):
    """If FSDP2 has spread a model over the ranks, bring all its weights here until reshard(): in generate()
    ranks may need different numbers of steps, and a gather that not all ranks join would hang."""
    for unit in (m for m in model.modules() if isinstance(m, FSDPModule)):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()  # now, not when it is used: a rank may have no episode to play


def reshard(model):
    for unit in (m for m in model.modules() if isinstance(m, FSDPModule)):
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def print0(machine, *words):
    """Print on rank 0, above the progress bars."""
    if machine.rank == 0:
        with tqdm.external_write_mode():
            print(*words, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Second: where runs are, and models from disk. A run is a folder with args.json (its flags) and
# checkpoint-STEP (a transformers folder). A model of yours is a transformers folder or a name of the hub.

def run_folder(args, name):
    """Folder of a run: out/gp/id/rl, or out/gp-vl/id-ood/rl with the trained rule and visual variation. All
    rules share a base, out/gp/base; with pictures each visual variation has its own."""
    task = os.path.join(args.out, args.env + "-vl" * args.vl)
    if name == "base":
        return os.path.join(task, "base-ood" if args.visual == "ood" else "base")
    return os.path.join(task, args.rule + f"-{args.visual}" * args.vl, name)


def checkpoint_at(path):
    """`path` itself if it is a checkpoint, else the newest checkpoint of the run there -> path, or None.
    Checkpoints are given their name when they are whole, so a killed run leaves no broken one."""
    if os.path.isfile(os.path.join(path, "config.json")):
        return path
    names = os.listdir(path) if os.path.isdir(path) else []
    steps = [int(name[11:]) for name in names if re.fullmatch("checkpoint-[0-9]+", name)]
    return os.path.join(path, f"checkpoint-{max(steps)}") if steps else None


def read_json(file, *needed):
    """-> dict, which has the keys `needed`."""
    try:
        with open(file, encoding="utf-8") as f:
            content = dict(json.load(f))
    except (OSError, ValueError, TypeError) as e:
        fail(f"{file} is missing or damaged: {first_line(e)}")
    if lost := set(needed) - content.keys():
        fail(f"{file} is damaged: it has no {min(lost)}")
    return content


def saved_args(path):
    """The flags in args.json of the run or checkpoint at `path` -> dict; {} for a model of yours."""
    checkpoint = checkpoint_at(path)
    if checkpoint is None or not os.path.isfile(os.path.join(checkpoint, "state.json")):
        return {}
    file = os.path.join(os.path.dirname(os.path.abspath(checkpoint)), "args.json")
    return read_json(file) if os.path.isfile(file) else {}  # a copy of a checkpoint may stand elsewhere


def write_json(path, content):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)
    os.replace(path + ".tmp", path)


def found_models(args):
    """{name: path} of the usual stages below --out that have a checkpoint, in the order they are trained."""
    places = {stage: run_folder(args, stage) for stage in ("base", "init", "sft", "rl")}
    if args.model:
        places["base"] = args.model
    return {name: path for name, path in places.items() if path == args.model or checkpoint_at(path)}


def task_flags(args):
    """The flags that name the task and the model, as on a command line -> str."""
    given = {name: getattr(args, name) for name in ("visual", "pixels", "out", "seed", "data", "model")}
    named = [f" --{name} {shlex.quote(str(x))}" for name, x in given.items() if x not in (None, "out", 0)]
    return f"--env {args.env} --rule {args.rule}" + " --vl" * args.vl + "".join(named)


FALLBACK_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")


def load(path, device="cpu", dtype=torch.float32):
    """-> (model in eval mode, tokenizer). path: a run, a checkpoint, or OWNER/NAME of the hub. dtype: of
    the weights, fp32 for a model that is trained.

    tok.processor is a vision-language model's processor, a callable, or None. If it needs a package that is
    not here (torchvision for Qwen2.5-VL), it is a str with the reason, and tasks in words still run.
    model.generation_config keeps only the end and padding ids and suppress_tokens: a released model's top-p
    or repetition penalty would make what is sampled differ from what PPO scores."""
    folder = checkpoint_at(path)
    if folder is None and os.path.isdir(path) and any(name.endswith(".gguf") for name in os.listdir(path)):
        fail(f"{path!r} holds a GGUF and no transformers folder. To make one, load the model by "
             "from_pretrained(folder, gguf_file=NAME, quantization_config=GgufConfig(dequantize=True)), the "
             "tokenizer with the same gguf_file, and save both by save_pretrained()")
    if folder is None and (path.count("/") != 1 or os.path.exists(os.path.dirname(path))):
        fail(f"no checkpoint at {path!r}: no config.json and no checkpoint-STEP there")
    try:
        vision = AutoConfig.from_pretrained(folder or path).model_type in VLMS
        processor = load_processor(folder or path) if vision else None
        tok = getattr(processor, "tokenizer", None) or AutoTokenizer.from_pretrained(folder or path)
        tok.chat_template = getattr(processor, "chat_template", None) or tok.chat_template  # with pictures
        kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model, report = kind.from_pretrained(folder or path, dtype=dtype, output_loading_info=True,
                                             ignore_mismatched_sizes=True)  # they are named below
        vocabulary = model.get_output_embeddings().out_features
        model.get_input_embeddings().padding_idx = None  # that row, often the end token's, would not learn
        # Some config.json ask for outputs with which generate(), or saving after the training, fails.
        usual = {"output_router_logits": False, "output_attentions": False, "return_dict": True}
        for config in (model.config, model.config.get_text_config()):
            config.update({name: x for name, x in usual.items() if hasattr(config, name)})
    except Exception as e:  # transformers, safetensors, tokenizers: each its own kinds for a damaged file
        fail(f"cannot load a model from {path!r}: {first_line(e)}")
    lost = sorted({*report["missing_keys"], *(str(name) for name, *_ in report["mismatched_keys"])})
    if lost:
        fail(f"{path!r}: {len(lost)} weights are missing or have another shape than its config.json says, "
             f"{lost[0]} first")
    tok.processor = processor
    eos = prepare_chat(path, tok, model)
    # The tokens that stand for pictures are not sampled: a later turn would look for a picture there.
    marks = {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")}
    suppressed = sorted(m for m in marks - {None} if m < vocabulary)  # Mllama's mark lies beyond
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tok.pad_token_id,
                                               suppress_tokens=suppressed or None)
    return model.to(device).eval(), tok


def prepare_chat(path, tok, model):
    """Give a tokenizer its one chat template and a padding id, and check that the model has embeddings for
    all ids in use -> the ids that end a turn, by the model's files and by its template. For a base model
    these two differ."""
    if isinstance(tok.chat_template, dict):  # several by name
        tok.chat_template = tok.chat_template.get("default")
    if tok.chat_template is None and tok.processor:
        fail(f"{path!r}: no chat template in its processor"
             + (f", or out of reach: {tok.processor}" if isinstance(tok.processor, str) else ""))
    if tok.chat_template is None:
        print(f"{path}: its tokenizer has no chat template; using a plain 'user: ... assistant: ...' one")
        tok.chat_template = FALLBACK_TEMPLATE
    tok.chat_template = re.sub(r"strftime_now\([^()]*\)", f"'{TODAY}'", tok.chat_template)
    form = turn_form(tok, tok.chat_template)
    if form.opened and form.header + form.blank:
        fail(f"{path!r}: its chat template ends a prompt with {form.opened!r} and begins an answer with "
             f"{form.header + form.blank!r}; both together are not supported")
    if form.opened and "</" not in form.opened:  # else it is a thought that is empty
        print(f"{path}: its chat template begins an answer with {form.opened!r}: thinking is not off")
    if tok.decode(tok("24", add_special_tokens=False).input_ids).replace(" ", "") != "24":
        fail(f"{path!r}: its tokenizer cannot spell 24; are the tokenizer's files in that folder?")
    known = len(model.get_input_embeddings().weight)  # a tokenizer may have more ids than its model
    used = prompt(tok, [{"role": "user", "content": "?"}]).ids + form.last + form.between
    if unknown := [i for i in used if i >= known]:
        fail(f"{path!r}: the model has no embedding for {tok.convert_ids_to_tokens(unknown[0])!r}, which its "
             "chat template uses; give it one by resize_token_embeddings()")
    its = model.generation_config.eos_token_id  # an id, a list of ids or None
    eos = {tok.eos_token_id, *torch.tensor([] if its is None else its).flatten().tolist()}
    eos = sorted(i for i in eos | set((form.last or form.between)[-1:]) if i in range(known))
    if not eos:
        fail(f"{path!r}: its tokenizer has no end-of-sequence token that the model knows")
    if tok.pad_token_id is None or tok.pad_token_id >= known:
        tok.pad_token = tok.convert_ids_to_tokens(eos[0])  # any will do: padding is masked
    return eos


def load_processor(path):
    """The processor of a vision-language model, or a str with the reason why there is none here."""
    try:
        processor = AutoProcessor.from_pretrained(path)
        return processor if hasattr(processor, "image_processor") else f"{path} holds no image processor"
    except Exception as e:  # a package that is missing, a damaged file: each family raises its own kinds
        return first_line(e)


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", metavar="PATH",
                        help="runs or checkpoints to compare (default: base, init, sft, rl)")
    args = parse(parser, argv)
    machine = setup(args)
    paths, home = found_models(args), os.path.dirname(run_folder(args, "rl"))
    if args.models:
        names = [os.path.basename(os.path.normpath(p)) for p in args.models]
        paths = {n if names.count(n) == 1 else os.path.relpath(p, home): p
                 for n, p in zip(names, args.models)}
    if not paths:
        fail(f"no checkpoints under {home}; train one: python rl.py {task_flags(args)}")
    if not args.episodes:
        fail("--episodes 0 leaves nothing to print")
    if args.vl:
        args.pixels = args.pixels or saved_args(next(iter(paths.values()))).get("pixels") or 1200
    result = table(paths, args, machine)
    if machine.rank == 0:
        os.makedirs(home, exist_ok=True)
        write_json(os.path.join(home, "eval.json"), result)
        print("written:", os.path.join(home, "eval.json"))


if __name__ == "__main__":
    script(main)
