"""sft.py: supervised fine-tuning, and the pretraining of the tiny base it starts from. One loop does both.

    python sft.py --env gp --stage base            # tiny model + tokenizer from scratch     -> out/gp/base
    python sft.py --env gp --rule id --stage init  # the short SFT that RL starts from       -> out/gp/id/init
    python sft.py --env gp --rule id               # SFT from the init at RL's compute       -> out/gp/id/sft
    python sft.py --env virl --vl --visual id --rule id              # from pictures -> out/virl-vl/id-id/sft
    python sft.py --env gp --rule id --resume      # goes on with an interrupted run, or with more --tokens
    python sft.py --model Qwen/Qwen2.5-0.5B-Instruct --out out/qwen  # a model of yours, with its own rates
    torchrun --nproc_per_node=2 sft.py --env gp --rule id            # several devices: FSDP2

A missing earlier stage is made first, by its own command, which is printed. A run is a folder with args.json
(its flags), metrics.jsonl and checkpoint-STEP. A folder that exists is never trained again without --resume:
choose another --name. Ctrl-C and SIGTERM save after the current step.

The loss (paper, section 3): -log pi(answer | prompt), averaged over the answer's tokens and the token that
ends the turn. Prompts carry no loss. In pretraining every token is a target, except the first token of a row
and image placeholders.

The demonstrator (--demos) decides what SFT does:
    expert   writes a right answer in another style than the model's. GeneralPoints: any one of a hand's
             solutions, always the same for a hand. V-IRL: the current instruction in shorthand.
    habit    writes what the base would write: the shortest solution; the instruction word by word.

Compute (paper, appendix): X = 6 N D, for N parameters and D trained tokens. Budgets (--tokens) are X / 6N,
so the same number in rl.py is the same compute. Budgets leave out the init's compute; logged flops have it.

Departures from the authors' release: README.md lists them. Left out: sequence packing for SFT, LoRA.
"""
import gc
import json
import math
import os
import posixpath
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import SimpleNamespace

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
try:
    import resource
except ImportError:  # Windows: no peak memory
    resource = None

from eval import (ENVS, Segment, all_gather, all_sum, answer_ids, chat_text, check_model, checkpoint_at,
                  columns, context_tokens, encode, evaluate, fail, first_line, forward, found_models, in_turn,
                  load, make, new_parser, number, parse, print0, prompt, read_json, run_folder,
                  saved_args, script, setup, summary, table, task_flags, write_json)

# Hyper-parameters. A tuple has a column for each task, a number serves all. Some are also flags.
TASKS =                  ("gp",   "gp-vl", "virl", "virl-vl")
EVERY = {  # for every run, also rl.py's
    "eval_episodes":     100,                                # per column, for each evaluation while it trains
    "saves":             4,                                  # checkpoints in a run
    "micro_tokens":      2048,                               # tokens a forward pass, padding included
    "max_new_tokens":    (32,     32,      17,     17),      # the longest demonstrations have 30 and 16
}
BASE = {
    "tokens":            (1.6e6,  2.5e6,   1.2e6,  1.5e6),   # compute X / 6N
    "batch":             (16,     21,      16,     16),      # rows of documents a step
    "row_tokens":        (128,    192,     256,    256),     # width of a row
    "chat_share":        (0.08,   0.12,    0.15,   0.15),    # documents in the task's chat form
    "picture_share":     (0.0,    0.5,     0.0,    0.5),     # documents with pictures
    "lr":                (3e-3,   3e-3,    1e-2,   1e-2),    # AdamW: embeddings, norms
    "muon_lr":           0.01,                               # Muon: the matrices inside the blocks
    "vision_rate":       (1.0,    0.1,     1.0,    0.1),     # factor of vision's rate; at 0.3 some never read
    "warmup":            50,                                 # steps of linear warm-up
    "decay":             0.4,                                # last share of the budget with lr going to 0
    "evaluations":       1,                                  # between equal shares of the budget; 1: none
}
SFT = {
    "tokens":            (7e5,    8e5,     6e5,    6e5),     # compute X / 6N, the same as PPO's
    "batch":             (128,    128,     16,     16),      # episodes a step: hands, or routes of ~8 rows
    "lr":                (2e-4,   2e-4,    2e-3,   2e-3),    # AdamW; chosen on seed 0: gp by seen, virl by ID
    "muon_lr":           0.0,
    "vision_rate":       1.0,
    "warmup":            5,
    "decay":             0.0,
    "evaluations":       2,
}
INIT = {
    **SFT,
    "tokens":            8e4,                                # enough to take on the expert's style
    "lr":                (3e-4,   3e-4,    3e-5,   3e-5),
    "evaluations":       0,
}
# What differs for a model of yours (--model), in SFT and PPO. The rates rest on one model of 135M parameters
# (results/README.md, section released). Larger ones want smaller rates: the paper's 11B had 1e-6.
REAL = {"tokens": 1e7, "batch": 64, "lr": 1e-5, "micro_tokens": 4096, "max_new_tokens": 256}
REAL_INIT = {**REAL, "tokens": 1e6, "lr": 2e-5}
STAGES = {"base": BASE, "init": INIT, "sft": SFT}
FLAGS = {  # hyper-parameters of every run that are flags: type, lowest and highest value, help
    "tokens": (float, 1e-9, 1e30, "the budget of compute, X / 6N, in trained tokens"),
    "batch": (int, 1, math.inf, "episodes (base: rows of documents) a step and rank"),
    "lr": (float, 1e-12, 1e30, "AdamW's learning rate"),
    "evaluations": (int, 0, math.inf, "how often success is evaluated while it trains; 0: never"),
    "micro_tokens": (int, 1, math.inf, "tokens a forward pass when not sampling, padding included"),
}
CLIP_GRAD = 1.0  # the gradient's norm is clipped to this
TINY = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True)
# V-IRL's current instruction has to be looked up. A first layer that sees only the token and the three before
# it, and normalised queries and keys, let a tiny model learn that sooner. Both are stock parts of Qwen3.
TINY_CLASS = {"virl": dict(model_type="qwen3", use_sliding_window=True, sliding_window=4,
                           layer_types=["sliding_attention", "full_attention", "full_attention"])}


# ------------------------------------------------------------------------------------------------------------
# The tiny model: 0.6M parameters, an ordinary Llama or Qwen3 with a byte-level tokenizer that knows the
# task's phrases. With pictures: an ordinary LLaVA of 1.1M around it.

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def build_tiny(env_name, seed, vl=False, pixels=80):
    """-> (causal language model with random weights, tokenizer). The vocabulary has the 256 bytes, so any
    text can be encoded, and each of the environment's phrases as one token.

    vl: -> LlavaForConditionalGeneration, the same model behind a CLIP vision tower. Patches are pixels / 4
    wide: a picture is 16 tokens. tok.processor resizes and normalises pictures with Pillow and NumPy."""
    letters = GPT2Tokenizer(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[])
    tok = PreTrainedTokenizerFast(
        tokenizer_object=letters.backend_tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"] + ["<image>"] * vl,
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)
    tok.add_tokens([phrase for phrase in dict.fromkeys(ENVS[env_name].fragments(vl)) if len(phrase) > 1])
    torch.manual_seed(seed)
    text = AutoConfig.for_model(
        **TINY_CLASS.get(env_name, {"model_type": "llama"}), **TINY, vocab_size=len(tok),
        pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None)
    tok.processor = None
    if vl:
        from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # no torchvision
        side = {"height": pixels, "width": pixels}
        tok.processor = LlavaProcessor(
            CLIPImageProcessorPil(size=side, crop_size=side), tok, patch_size=pixels // 4,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=tok.chat_template)
        tower = CLIPVisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                                 num_attention_heads=4, image_size=pixels, patch_size=pixels // 4)
        model = LlavaForConditionalGeneration(LlavaConfig(
            vision_config=tower, text_config=text, vision_feature_layer=-1, tie_word_embeddings=True,
            vision_feature_select_strategy="default", image_token_id=tok.convert_tokens_to_ids("<image>")))
    else:
        model = AutoModelForCausalLM.from_config(text)
    model.generation_config.eos_token_id = [tok.eos_token_id]
    model.generation_config.suppress_tokens = [model.config.image_token_id] if vl else None  # see load()
    return model, tok


# ------------------------------------------------------------------------------------------------------------
# Batches. A row is a Segment: ids, and action_mask = 1 on the tokens that carry loss.

def demonstration_row(tok, model, messages, images, answer):
    """-> Segment. Only the answer and the end of its turn carry loss; the prompt's ids are a rollout's.

        ids      <user> Make 24 ... <assistant>  {"cards" ... } <end>
        mask      0      0  0  0     0            1   1   1  1   1"""
    row = prompt(tok, messages, images)
    row.add(answer_ids(tok, model, answer), 1)
    if len(row.ids) > (limit := context_tokens(model)):
        fail(f"the model's context of {limit} tokens is too short: a demonstration has {len(row.ids)}")
    return row


def demonstrations(env, seed, demonstrator="expert"):
    """The demonstrator plays one episode -> [(messages, images, answer), ...], one for each state."""
    messages, images = env.reset(seed)
    states = []
    while messages:
        answer = env.expert(demonstrator)
        states.append(([*messages], images, answer))  # a copy: an environment may go on with its own list
        step = env.step(answer)
        messages, images = step.messages, step.images
    return states


def pretraining_rows(args, env, tok, rng):
    """args.batch rows of whole documents, each at most args.row_tokens long. All tokens have loss but a row's
    first and image placeholders."""
    rows, spare, image_id = [], [], tok.convert_tokens_to_ids("<image>")  # None for a text model
    while len(rows) < args.batch:
        ids, pixel_values = [], []
        while True:
            if not spare:
                for _ in range(16):  # what is left of them when the last row is full is thrown away
                    if args.picture_share and rng.random() < args.picture_share:
                        doc, images = env.picture_document(rng, args.chat_share, pixels=args.pixels,
                                                           rare="id" if args.visual == "ood" else "ood")
                    else:
                        doc, images = env.document(rng, args.chat_share), []
                    text = doc + tok.eos_token if isinstance(doc, str) else chat_text(tok, doc, images)
                    spare.append(encode(tok, text, images))
            if ids and len(ids) + len(spare[-1].ids) > args.row_tokens:
                break
            ids += spare[-1].ids
            pixel_values += spare.pop().pictures.values()
        ids = ids[:args.row_tokens]
        rows.append(Segment(ids, [int(i > 0 and token != image_id) for i, token in enumerate(ids)]))
        if pixel_values:
            rows[-1].pictures = {"pixel_values": torch.cat(pixel_values)}
    return rows


def batch_rows(args, env, tok, model, step, rank):
    """The rows of one step on one rank -> [Segment]. They depend on (stage, seed, step, rank) only, so a
    checkpoint needs no generator's state."""
    rng = random.Random(f"{args.stage}/{args.seed}/{step}/{rank}")
    torch.manual_seed(rng.randrange(2 ** 31))
    if args.stage == "base":
        return pretraining_rows(args, env, tok, rng)
    return [demonstration_row(tok, model, *state) for i in range(args.batch)
            for state in demonstrations(env, f"sft/{args.seed}/{step}/{rank}/{i}", args.demos)]


def sft_loss(model, rows, denominator, pad_id, machine):
    """Sum of the negative log-likelihoods of the action tokens / denominator -> scalar, fp32."""
    _, logits, _, said = forward(model, rows, pad_id, machine)              # [N, V], [N]
    return torch.nn.functional.cross_entropy(logits, said, reduction="sum") / denominator


# ------------------------------------------------------------------------------------------------------------
# The training loop.

class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest (semi-)orthogonal matrix (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon): all directions of a matrix are learnt at about the same speed.

    Five Newton-Schulz steps push all singular values of the update towards 1. It differs from
    torch.optim.Muon in two things, for speed on a CPU: it computes in fp32 (torch's in bfloat16, which most
    laptops emulate), and matrices of one shape are stacked, tall ones transposed.

        weights [128, 320], [320, 128] and [128, 320]   ->   one stack [3, 128, 320]"""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        stacks = {}  # {(smaller side, larger side): [(weight, its update, its group), ...]}
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])                  # Nesterov's
                update = update.T if p.shape[0] > p.shape[1] else update
                stacks.setdefault(update.shape, []).append((p, update, group["lr"]))
        for members in stacks.values():
            x = torch.stack([update for _, update, _ in members])                 # [k, m, n], m <= n
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):
                a = x @ x.mT                                                      # [k, m, m]
                x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
            for (p, _, lr), update in zip(members, x):
                rows, columns = p.shape
                p.sub_(update.T if rows > columns else update, alpha=lr * max(1, rows / columns) ** 0.5)


def make_optimizers(model, args):
    """-> [AdamW] or, if muon_lr is above 0, [AdamW, Muon]: Muon has the matrices of blocks and projector,
    AdamW the rest. Vision tower and projector may have other rates. peak_lr is a group's rate at factor 1."""
    groups = {}  # {(is it for Muon, is it of vision): [parameter, ...]}
    for name, p in model.named_parameters():
        matrix = args.muon_lr > 0 and p.ndim == 2 and "embed" not in name and "lm_head" not in name
        vision = any(word in name for word in ("vision", "visual", "projector", "connector"))
        groups.setdefault((matrix, vision), []).append(p)
    adamw, muon = [], []
    for (matrix, vision), parameters in sorted(groups.items()):
        lr = (args.muon_lr if matrix else args.lr) * (args.vision_rate if vision else 1)
        (muon if matrix else adamw).append({"params": parameters, "lr": lr, "peak_lr": lr})
    # foreach=True, the default on CUDA, would take 4 bytes a weight more.
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.98), weight_decay=0.0, foreach=False)]
    if muon:
        optimizers.append(Muon(muon, args.muon_lr))
    return optimizers


def train(args, machine, stop):
    """Train one stage in the folder args.folder. stop: the Event that a signal sets.

    metrics.jsonl gets a record a step: loss (nats per answer token; it falls, to the entropy of the
    demonstrations), grad_norm (before clipping), lr, tokens_per_s, flops and tokens (X and X / 6N, with the
    init's), memory_gb (the peak). Records with seen, id and ood hold success rates."""
    # ---- load: a new run's model, or the newest checkpoint of one that is resumed
    source, state, tensors = load_checkpoint(args, machine)
    model, tok = load_model(source, args, machine)
    optimizers = make_optimizers(model, args)
    for o, saved in zip(optimizers, tensors.get("optimizers", [])):
        restore(o, saved)
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    del tensors
    env = make(args, rule=args.rule, split="train")
    check_model(source or "the tiny model", model, tok, env, args.max_new_tokens, machine)
    if args.stage != "base":  # a model that cannot take a demonstration leaves no folder behind
        demonstration_row(tok, model, *demonstrations(env, 0, args.demos)[0])
    n = sum(p.numel() for p in model.parameters())
    step, flops, start_flops = state["step"], state["flops"], state["start_flops"]
    budget = 6 * n * args.tokens                               # FLOP
    progress = (flops - start_flops) / budget                  # share of the budget that is used up
    before = progress if step or args.stage == "base" else -1  # one step earlier; -1: evaluate the init
    rates, bar = "", open_run(args, machine, n, step)

    while True:
        # ---- evaluate, save, stop. Something is due when int(progress * how often) has changed
        ending = progress >= 1 or step >= (args.steps or math.inf)
        stopping = all_sum([stop.is_set()], machine)[0] > 0    # all ranks leave at the same step
        if int(progress * args.evaluations) > int(before * args.evaluations) and not ending:
            cells = evaluate(model, tok, args, machine, args.eval_episodes)
            rates = log(args, machine, {"step": step, "flops": flops, "tokens": flops / 6 / n, **cells},
                        f"[{args.stage}] step {step:4d} {100 * progress:3.0f}% ")
        if step > state["step"] and (
                int(progress * args.saves) > int(before * args.saves) or ending or stopping):
            save_checkpoint(args.folder, model, tok, machine,
                            {"step": step, "flops": flops, "start_flops": start_flops, "world": machine.world,
                             "done": progress >= 1, "scaler": scaler.state_dict()},
                            {"optimizers": [o.state_dict() for o in optimizers]})
        if ending or stopping:
            bar.close()
            return

        # ---- batch
        start = time.perf_counter()
        rows = batch_rows(args, env, tok, model, step, machine.rank)

        # ---- learning rate: linear warm-up, then constant, then to zero over the last share of the budget
        factor = min(1, (step + 1) / args.warmup)
        factor *= min(1, (1 - progress) / args.decay if args.decay else 1)
        for o in optimizers:
            o.zero_grad(set_to_none=True)
            for group in o.param_groups:
                group["lr"] = group["peak_lr"] * factor

        # ---- loss and gradient: one denominator for the whole batch, over all micro-batches and ranks
        counts = [sum(sum(r.action_mask) for r in rows), sum(len(r.ids) for r in rows)]
        loss_tokens, tokens = all_sum(counts, machine)
        model.train()
        loss = 0.0
        for part, weight in micro_batches(rows, args.micro_tokens, machine):
            part_loss = weight * sft_loss(model, part, loss_tokens, tok.pad_token_id, machine)
            scaler.scale(part_loss).backward()
            loss += part_loss.item()
        loss = all_sum([loss], machine)[0]
        if not math.isfinite(loss):
            fail(f"loss is {loss} at step {step} (lr {args.lr:g}, dtype {machine.dtype}); "
                 "the last checkpoint is intact")
        norm = clip_and_step(parameters, optimizers, scaler, f"step {step}")

        # ---- log
        step, flops, before = step + 1, flops + 6 * n * tokens, progress
        progress = (flops - start_flops) / budget
        seconds = time.perf_counter() - start
        minutes = seconds * max(0, 1 - progress) / (progress - before) / 60
        log(args, machine,
            {"step": step, "flops": flops, "tokens": flops / 6 / n, "loss": loss, "grad_norm": norm,
             "lr": args.lr * factor, "tokens_per_s": tokens / seconds},
            f"[{args.stage}] about {max(0.1, minutes):.1f} minutes to go on this machine" * (step == 5))
        bar.update(min(100, 100 * progress) - bar.n)
        bar.set_postfix_str(f"loss {loss:.3f} {rates}")


# ------------------------------------------------------------------------------------------------------------
# Plain functions that the loops of sft.py and rl.py share. First the step.

def clip_and_step(parameters, optimizers, scaler, where):
    """Unscale, clip and step -> the gradient's norm over all ranks, before clipping.

    The ranks' gradients have been summed: losses are divided by the token count of all ranks. No step is
    taken on a gradient that is not finite. In fp16 such gradients happen: the loss scaler lowers its scale,
    and the caller sees the norm. Otherwise the run ends."""
    for o in optimizers:
        scaler.unscale_(o)
    norm = clip_grad_norm_(parameters, CLIP_GRAD).item()
    if math.isfinite(norm):  # left to itself, GradScaler skips only the optimizers with a bad entry
        for o in optimizers:
            scaler.step(o)
    elif not scaler.is_enabled():
        fail(f"the gradient is not finite at {where}; the last checkpoint is intact")
    scaler.update()
    return norm


def micro_batches(segments, budget, machine):
    """Cut segments, shortest first, into lists of at most `budget` tokens, padding included, or of one
    segment -> [(micro-batch, weight), ...].

        lengths 9 3 4 3, budget 10   ->   [3 3] [4] [9], weights 1

    FSDP2's gathers are collective: if one rank runs a block that another skips, it hangs. So under torchrun
    ranks with fewer micro-batches repeat one with weight 0."""
    parts = [[]]
    for s in sorted(segments, key=lambda s: len(s.ids)):
        if parts[-1] and len(s.ids) * (len(parts[-1]) + 1) > budget:
            parts.append([])
        parts[-1].append(s)
    weighted = [(part, 1.0) for part in parts]
    if machine.world > 1:
        ranks = all_gather((len(parts), {bool(s.pictures) for s in segments}), machine)
        if len(set.union(*(kinds for _, kinds in ranks))) > 1:  # a vision tower is not run without pictures
            fail("torchrun: pictures must be in all conversations or in none")
        weighted += [(parts[0], 0.0)] * (max(n for n, _ in ranks) - len(parts))
    return weighted


def recompute_activations(model):
    """Activation checkpointing: keep only each block's input, and run the block again in the backward pass.
    transformers' own works only in train() mode, which PPO avoids because of dropout and similar noise.
    Where no gradient is asked for, as in rollout(), checkpoint() only runs the block."""
    for block in blocks(model, "--activation_checkpointing"):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def blocks(model, what):
    """The blocks (layers) of a model, which its class names -> [module]. what: for the error, who asks."""
    names = getattr(model, "_no_split_modules", ["Linear"])  # a value head is one block
    found = [m for m in model.modules() if type(m).__name__ in (names or ())]
    if not found:
        fail(f"{what}: {type(model).__name__} does not name its blocks (_no_split_modules)")
    return found


# ------------------------------------------------------------------------------------------------------------
# Several devices: torchrun means FSDP2. Each rank holds its part of every weight (a DTensor), and so of the
# gradient and of AdamW's state, and gathers the other parts while a block computes.

def shard(model, machine, dtype):
    """Move a model from the CPU to this rank's device: all of it with one process, this rank's part with
    several. dtype: of the gathered weights. No other rank is needed, so the ranks can do it in turn."""
    if machine.world == 1:
        return model.to(machine.device)
    if machine.dtype == torch.float16:
        fail("torchrun works only with bf16 or fp32: in fp16 the ranks' loss scalers would differ")
    inner_first = [*reversed(blocks(model, "torchrun")), model]  # a unit shards what no inner one has
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # about changes in place; there are none here
    mesh = DeviceMesh(machine.device.type, torch.arange(machine.world))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in dict.fromkeys(inner_first):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)          # a sum over the ranks; the default is the mean
        unit.set_force_sum_reduction_for_comms(True)  # or gloo refuses the line above
    gc.collect()  # a sharded model refers to itself: without this the one before it stays in memory
    return model


def gathered(x, machine):
    """Dicts and lists of tensors -> whole on rank 0's CPU, None on other ranks. All ranks must call it."""
    @cache  # tied weights are one tensor under two names and stay one, which save_pretrained() asks for
    def whole(t):
        t = t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()
        return t.cpu() if machine.rank == 0 else None
    return tree_map_only(torch.Tensor, whole, x)


def restore(optimizer, saved):
    """optimizer.load_state_dict(), with each saved tensor copied or cut to this rank's part."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, x in saved["state"].get(i, {}).items():
            if isinstance(p, DTensor) and name != "step":
                own = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
            else:
                own = x.clone()
            saved["state"][i][name] = own
    optimizer.load_state_dict(saved)


# ------------------------------------------------------------------------------------------------------------
# A run's folder: args.json, metrics.jsonl, checkpoint-STEP.

def save_checkpoint(folder, model, tok, machine, state, tensors):
    """Write folder/checkpoint-STEP: a transformers folder with state.json (plain values) and optimizer.pt
    (tensors). All ranks must call it.

    It is written under another name, flushed to the disk and then renamed, so a run that is killed at any
    moment leaves a whole checkpoint. Older ones are removed after that."""
    weights, tensors = gathered([model.state_dict(keep_vars=True), tensors], machine)
    if machine.rank == 0:
        path = os.path.join(folder, f"checkpoint-{state['step']}")
        try:
            shutil.rmtree(path + ".part", ignore_errors=True)
            model.save_pretrained(path + ".part", state_dict=weights)
            (tok.processor if callable(tok.processor) else tok).save_pretrained(path + ".part")
            torch.save(tensors, os.path.join(path + ".part", "optimizer.pt"))
            write_json(os.path.join(path + ".part", "state.json"), state)
            if hasattr(os, "sync"):  # not on Windows
                os.sync()
            os.rename(path + ".part", path)
        except Exception as e:  # a full disk: OSError, RuntimeError or SafetensorError, by who writes
            fail(f"cannot save to {path}: {e}; checkpoints saved before are intact")
        for name in os.listdir(folder):
            if re.fullmatch(r"checkpoint-[0-9]+(\.part)?", name) and name != os.path.basename(path):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    all_gather(None, machine)  # the other ranks wait


def load_checkpoint(args, machine):
    """Where a run begins -> (path of a model or None, state, tensors): at its newest checkpoint if it is
    resumed and has one. Else at args.init, without tensors; the state then holds the compute of that init."""
    path = checkpoint_at(args.folder) if args.resume else None
    if path is None:
        start = 0.0
        if args.init and saved_args(args.init).get("stage", "base") != "base":
            start = read_json(os.path.join(checkpoint_at(args.init), "state.json"), "flops")["flops"]
        return args.init, {"step": 0, "flops": start, "start_flops": start, "scaler": {}}, {}
    file = os.path.join(path, "optimizer.pt")
    state = read_json(os.path.join(path, "state.json"), "step", "flops", "start_flops", "world", "scaler")
    if state["world"] != machine.world:
        fail(f"--resume: {path} was trained by {state['world']} processes, and this is {machine.world}: "
             "the batches would not be the same")
    try:
        return path, state, torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # missing, cut off, no such file format: each its own kind
        fail(f"{file} is missing or damaged: {first_line(e)}")


def load_model(path, args, machine, trained=True):
    """-> (model, tokenizer): the whole model or, under torchrun, this rank's part. path: None builds the tiny
    one. trained: True for weights in fp32; False for frozen weights in the dtype that they compute in."""
    with in_turn(machine):
        if path is None:
            model, tok = build_tiny(args.env, args.seed, args.vl, args.pixels)
        else:
            model, tok = load(path, dtype=torch.float32 if trained else machine.frozen)
        if args.activation_checkpointing and trained:
            recompute_activations(model)
        if not trained:
            model.requires_grad_(False)
        return shard(model, machine, machine.dtype), tok


FOLDER_EXISTS = "{} exists: go on with it by --resume, or choose another --name or --out"


def open_run(args, machine, n, step):
    """Make the folder of a new run; of a resumed run, drop the records after `step` -> a progress bar in
    percent of the budget, silent when not a terminal. n: number of parameters."""
    print0(machine, f"[{args.stage}] {args.env}, rule {args.rule}: {n / 1e6:.3f}M parameters, "
           f"{6 * n * args.tokens:.3g} FLOP on {machine.device} x {machine.world} in "
           f"{str(machine.dtype)[6:]} ({machine.why}) -> {args.folder}")
    if args.from_elsewhere:
        print0(machine, f"[{args.stage}] a model of yours, so with", *(
            f"--{name} {getattr(args, name):g}"
            for name in ("lr", "tokens", "batch", "micro_tokens", "max_new_tokens")))
    if machine.rank == 0:
        try:
            os.makedirs(args.folder, exist_ok=args.resume)
        except FileExistsError:
            fail(FOLDER_EXISTS.format(args.folder))
        file = os.path.join(args.folder, "metrics.jsonl")
        kept = [r for r in read_log(file) if step and r.get("step", 0) <= step]  # step 0: it begins anew
        try:
            write_json(os.path.join(args.folder, "args.json"), vars(args))
            with open(file + ".tmp", "w", encoding="utf-8") as f:
                first = {"run": args.stage, "n": n, **vars(args)}
                f.writelines(json.dumps(r) + "\n" for r in kept or [first])
            os.replace(file + ".tmp", file)
        except OSError as e:
            if not args.resume:  # without its args.json no command could use the folder
                shutil.rmtree(args.folder, ignore_errors=True)
            fail(f"cannot write to {args.folder}: {e}")
    return tqdm(total=100, desc=args.stage, disable=None if machine.rank == 0 else True,
                bar_format="{desc} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining} {postfix}")


def log(args, machine, record, text=""):
    """Append a record to metrics.jsonl, and print the text and the record's success rates -> these as str."""
    rates = summary(record, args) if "seen" in record else ""
    if text:
        print0(machine, text + rates)
    if machine.rank == 0:
        with open(os.path.join(args.folder, "metrics.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps({**record, "memory_gb": peak_memory_gb(machine)}) + "\n")
    return rates


def read_log(file):
    """metrics.jsonl -> [record, ...], [] if there is no file. Lines that a kill has damaged are left out."""
    records = []
    with suppress(FileNotFoundError), open(file, encoding="utf-8", errors="replace") as f:
        for line in f:
            with suppress(ValueError):
                records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict)]


def peak_memory_gb(machine):
    if machine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(machine.device) / 2 ** 30
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2 ** 10  # bytes on a Mac, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


@contextmanager
def stop_signals():
    """-> an Event that Ctrl-C and SIGTERM set. The loop reads it once a step, saves and leaves. A second
    Ctrl-C stops at once. A second SIGTERM does not, because clusters send it to torchrun and to its ranks."""
    stop = threading.Event()

    def handler(*_):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step, then saving; Ctrl-C again stops at once", flush=True)
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, old in before.items():
            signal.signal(s, old)


# ------------------------------------------------------------------------------------------------------------
# The command line.

ANEW = ("tokens", "steps", "device", "dtype", "micro_tokens")  # flags that may be given anew with --resume


def fill_in(args, table):
    """Give args the hyper-parameters that no flag has set, from its task's column. A new task has gp's."""
    task = args.env + "-vl" * args.vl
    column = TASKS.index(task if task in TASKS else "gp" + "-vl" * args.vl)
    for name, default in table.items():
        if getattr(args, name, None) is None:
            setattr(args, name, default[column] if isinstance(default, tuple) else default)


def run_parser(doc, table, flags):
    """An argparse parser of the flags that all runs have, and of `flags`: more rows as in FLAGS. table: the
    hyper-parameters that the help shows as defaults."""
    parser = new_parser(doc)
    add = parser.add_argument_group("the run").add_argument
    add("--init", type=posixpath.normpath, metavar="PATH",
        help="the model to start from (default: the init, made if it is missing)")
    add("--name", type=posixpath.normpath,
        help="the run's folder below out/ENV/RULE (default: the stage's name)")
    add("--resume", action="store_true",
        help="go on with the run in that folder, with the flags it began with; only "
             f"--{', --'.join(ANEW)} may be given anew")
    add("--steps", type=number(1), metavar="N", help="stop after so many steps at the latest")
    add("--activation_checkpointing", action="store_true",
        help="less memory for activations, for about a third more time")
    add = parser.add_argument_group("hyper-parameters").add_argument
    for name, (kind, low, high, text) in {**FLAGS, **flags}.items():
        x = {**EVERY, **table}[name]
        default = ", ".join(f"{t} {v:g}" for t, v in zip(TASKS, x)) if isinstance(x, tuple) else f"{x:g}"
        add(f"--{name}", type=number(low, high, kind), metavar="X" if kind is float else "N",
            help=f"{text} (default: {default})")
    return parser


def parse_run(parser, argv, tables, real=()):
    """Flags -> namespace with all hyper-parameters and the run's .folder. With --resume they are those of its
    args.json. tables: {stage: hyper-parameters}. real: what a model of yours has besides REAL."""
    args = parse(parser, argv)
    args.name = args.name or args.stage
    if args.name != args.stage and args.name in (*STAGES, "rl"):
        fail(f"--name {args.name} is the name of another stage; choose another --name")
    args.folder = run_folder(args, args.name)
    if os.path.exists(args.folder) and not args.resume:
        fail(FOLDER_EXISTS.format(args.folder))
    args.from_elsewhere = any(saved_args(path).get("from_elsewhere", True)
                              for path in (args.model, args.init) if path)
    defaults = {**EVERY, **tables[args.stage]}
    if args.data:  # the tiny tokenizer spells the names that it does not know
        defaults["max_new_tokens"] = REAL["max_new_tokens"]
    if args.from_elsewhere:
        defaults.update(REAL_INIT if args.stage == "init" else REAL)
        defaults.update(real)
    fill_in(args, defaults)
    if args.vl:
        start = args.init or args.model
        known = start and saved_args(start).get("pixels")
        args.pixels = args.pixels or known or (1200 if args.from_elsewhere else 80)
        if known and known != args.pixels:
            fail(f"{start} was trained on pictures with --pixels {known}, not {args.pixels}")
    if not args.resume:
        return args
    file = os.path.join(args.folder, "args.json")
    if (stage := read_json(file).get("stage")) != args.stage:
        fail(f"--resume: {args.folder} was made by stage {stage}, not {args.stage}")
    saved = read_json(file, *vars(args))
    now = parse(parser, argv, SimpleNamespace(**{**saved, "steps": None}))  # without --steps: to its budget
    for name, value in saved.items():
        if getattr(now, name) != value and name not in (*ANEW, "resume", "out"):
            fail(f"--resume: {args.folder} was made with --{name} {value}, not {getattr(now, name)}")
    now.folder, now.out = args.folder, args.out
    if saved["init"] == run_folder(SimpleNamespace(**saved), "init"):
        now.init = None  # the usual one, found again by command(): --out may have been moved
    elif saved["init"] and saved["init"].startswith(saved["out"] + "/"):  # another one, moved with it
        now.init = args.out + saved["init"][len(saved["out"]):]
    return now


def ensure(stage, args, machine):
    """The folder of an earlier stage -> path. If it is missing, it is made by a command that is printed."""
    folder = run_folder(args, stage)
    flags = (f"--stage {stage} {task_flags(args)} --episodes 0 --dtype {args.dtype} "
             f"--micro_tokens {args.micro_tokens} --max_new_tokens {args.max_new_tokens}"
             + f" --device {args.device}" * bool(args.device)
             + " --activation_checkpointing" * args.activation_checkpointing)
    if not any(all_gather(os.path.exists(folder), machine)):
        print0(machine, f"[{args.stage}] needs {folder}, so first: python sft.py {flags}")
        main(shlex.split(flags))
    saved = read_json(os.path.join(folder, "args.json"))
    for name in ["model", "seed", "pixels"] + ["data"] * (stage != "base"):  # a base has no data
        if saved.get(name) != getattr(args, name):
            fail(f"{folder} was made with --{name} {saved.get(name)}, not {getattr(args, name)}; "
                 "choose another --out")
    checkpoint = checkpoint_at(folder)
    if checkpoint is None or not read_json(os.path.join(checkpoint, "state.json")).get("done"):
        flags = task_flags(SimpleNamespace(**{**saved, "out": args.out}))  # its own: a base serves all rules
        fail(f"{folder} is not finished. If no other command is at work there, go on with it first: "
             f"python sft.py --stage {stage} {flags} --resume")
    return folder


def command(args, train):
    """What sft.py and rl.py do once their flags are read: make what is missing, train, evaluate."""
    machine = setup(args)
    for keywords in columns(args).values():  # damaged --data shows before the training
        make(args, **keywords)
    if args.stage == "base" and machine.world > 1:
        fail("the tiny base is pretrained by one process, not by torchrun: "
             f"python sft.py --stage base {task_flags(args)}")
    if args.stage == "init":
        args.init = args.model or ensure("base", args, machine)
    elif args.stage != "base":
        args.init = args.init or ensure("init", args, machine)
    start = time.perf_counter()
    with stop_signals() as stop:
        train(args, machine, stop)
        stopped = all_sum([stop.is_set()], machine)[0] > 0     # also in the last save
    print0(machine, f"[{args.stage}] {time.perf_counter() - start:.0f} s, peak memory "
                    f"{peak_memory_gb(machine):.1f} GB")
    if stopped:
        program = "rl.py" if args.stage == "rl" else f"sft.py --stage {args.stage}"
        launch = "python" if machine.world == 1 else f"torchrun --nproc_per_node={machine.world}"
        print0(machine, f"stopped; go on with it: {launch} {program} {task_flags(args)}"
               + f" --name {shlex.quote(args.name)}" * (args.name != args.stage) + " --resume")
        raise SystemExit(130)
    if machine.rank == 0 and not args.steps:  # --resume with fewer --tokens may end at an old checkpoint
        file = os.path.join(checkpoint_at(args.folder), "state.json")
        write_json(file, {**read_json(file), "done": True})
    if args.episodes:  # 0: an earlier stage, made on the way to another one
        report(args, machine)
        after = f"next: python {'sft' if args.stage == 'rl' else 'rl'}.py {task_flags(args)}"
        if args.stage in ("sft", "rl"):
            after += f" --init {shlex.quote(args.init)}" * (args.init != run_folder(args, "init"))
            after += f" --tokens {args.tokens:g}    # at the same compute"
        print0(machine, after)


def report(args, machine):
    """Evaluate the run and the models to compare it with: a table, eval.json and a last record in the log."""
    gc.collect()  # a sharded model refers to itself: without this it stays in memory beside the table's
    others = {"base": [], "init": ["base"]}.get(args.stage, ["base", "init", "sft", "rl"])
    paths = {name: path for name, path in found_models(args).items() if name in others and name != args.name}
    if args.stage in ("sft", "rl") and args.init != paths.get("init"):  # the usual models did not begin there
        name = os.path.basename(os.path.normpath(args.init))
        paths = {name if name != args.name else "init": args.init}
    result = table({**paths, args.name: args.folder}, args, machine)
    if machine.rank == 0:
        write_json(os.path.join(args.folder, "eval.json"), result)
        state = read_json(os.path.join(checkpoint_at(args.folder), "state.json"))
        log(args, machine, {"step": state["step"], "flops": state["flops"],
                            **{column: result["rows"][-1][column] for column in columns(args)}})


def main(argv=None):
    parser = run_parser(__doc__, SFT, {})
    parser.add_argument("--stage", choices=STAGES, default="sft",
                        help="base, then init, then sft (default: sft)")
    parser.add_argument("--demos", choices=["expert", "habit"], default="expert",
                        help="who writes the demonstrations (default: expert)")
    args = parse_run(parser, argv, STAGES)
    if args.stage == "base" and args.model:
        fail("--stage base trains the tiny model from nothing, --model brings one: begin at --stage init")
    if args.stage == "base" and args.name != "base":
        fail("--name: a base has its own place below --out; for another one choose another --out")
    if args.init and args.stage != "sft" and not args.resume:
        fail(f"--init works only with --stage sft; --stage {args.stage} has its own starting point")
    if args.demos not in ENVS[args.env].demonstrators:
        fail(f"--demos {args.demos}: {ENVS[args.env].title} has demonstrations by "
             f"{' or '.join(ENVS[args.env].demonstrators)}")
    command(args, train)


if __name__ == "__main__":
    script(main)
