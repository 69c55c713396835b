"""eval.py: a model plays an environment. Loading and saving checkpoints, rollouts, success rates, the ID/OOD table.

    python eval.py --env gp                                    # every checkpoint found under out/gp, rule id
    python eval.py --env gp --rule ood --models out/gp/ood/init out/gp/ood/rl --episodes 1000
    python eval.py --env gp --verify 1 --temperature 0.2       # one attempt per hand, the paper's sampling temperature
    python eval.py --env gp --k 4                              # pass@4: solved in any of four independent episodes
    python eval.py --env gp --vl --visual id                   # cards in pictures: one more column, and recognition
    python eval.py --seeds s0.json s1.json s2.json             # tables of three seeds in one, and paired differences
    python eval.py --env gp --plot assets/curves.png           # success against compute from the metrics.jsonl files

Columns (paper, section 5.1): seen = training episodes, ID = unseen episodes under the trained rule, OOD = unseen
episodes under the held-out rule; with --vl also visual OOD = unseen episodes under the trained rule in the other look.
Success = solved within `--verify` attempts; "first" = by the first attempt, which is
what --verify 1 would give, since later attempts cannot change an earlier one. Errors are one standard error,
sqrt(p (1 - p) / n), the paper's error bars. KL is KL(model || init) in nats per first answer, on ID prompts,
estimated from the model's own samples.

Departures from the paper: sampling at T = 1 by default, the distribution PPO optimises (the paper: T = 0.2);
300 episodes a cell (the paper: 234).
"""
import argparse
import difflib
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import combinations
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer,
                          GenerationConfig)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VLMS
from transformers.utils import logging as hf_logging

from env_gp import GeneralPoints
from env_virl import VIRL, DataError

# A new environment is one class with what env_gp.py's docstring lists, and one entry here.
ENVS = {"gp": GeneralPoints, "virl": VIRL}

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


def fail(message):
    """Bad input: one line on stderr, exit code 1, nothing already saved is touched."""
    raise SystemExit(f"error: {message}")


# ----------------------------------------------------------------------------------------------------------------------
# Flags and devices, the same for all three scripts.

class Parser(argparse.ArgumentParser):
    """argparse that answers an unknown flag with the nearest known one."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"error: {message}\n")

    def parse_args(self, args=None):
        known, unknown = super().parse_known_args(args)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        if known.visual and not known.vl:
            self.error("--visual chooses the look of pictures: it needs --vl")
        if known.pixels and not known.vl:
            self.error("--pixels is the size of pictures: it needs --vl")
        if known.vl:
            known.visual, known.pixels = known.visual or "id", known.pixels or (1200 if known.model else 80)
        return known


def script(main):
    """Run a script's main(): trouble with files ends in one line, Ctrl-C without a traceback."""
    try:
        main()
    except (OSError, torch.OutOfMemoryError, DataError) as e:
        fail(str(e).strip().splitlines()[0])
    except KeyboardInterrupt:
        raise SystemExit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def positive(kind):
    def convert(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value
    convert.__name__ = f"positive {kind.__name__}"
    return convert


def non_negative(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def seed_number(text):
    value = int(text)
    if not 0 <= value < 2 ** 31:
        raise ValueError
    return value


def shared_flags(parser):
    add = parser.add_argument
    add("--env", choices=ENVS, default="gp")               # the task: GeneralPoints or V-IRL
    add("--data", metavar="DIR", default=None)             # virl: the released routes in place of the procedural city
    add("--rule", choices=["id", "ood"], default="id")     # the rule trained on; the other one is held out
    add("--vl", action="store_true")                       # see the cards or streets in a picture, not in words
    add("--visual", choices=["id", "ood"], default=None)   # with --vl: the look trained on, default id (black suits)
    add("--pixels", type=positive(int), default=None)      # side of a picture; default: 80, with --model 1200
    add("--model", metavar="PATH", default=None)           # a transformers checkpoint in place of the tiny base
    add("--out", metavar="DIR", default="out")             # everything made here goes below this folder
    add("--seed", type=seed_number, default=0)             # fixes hands, demonstrations, samples and initial weights
    add("--verify", type=positive(int), default=None)      # attempts per episode; default: the environment's (gp: 5)
    add("--temperature", type=non_negative, default=1.0)   # sampling temperature; 0 = greedy (evaluation only)
    add("--max_new_tokens", type=positive(int), default=None)  # per answer; default: 1.25 x the longest demonstration
    add("--micro", type=positive(int), default=32)             # conversations (rows) per forward pass when not sampling
    add("--batch_rollout", type=positive(int), default=256)    # conversations per generate() call
    add("--device", default=None)                          # cpu | cuda | cuda:1 ...; default: cuda where there is one
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")  # autocast precision; weights stay fp32
    add("--episodes", type=positive(int), default=300)     # per cell of the final table
    return add


def setup(args):
    """Device, autocast precision and ranks -> namespace(device, dtype, why, rank, world, amp, scaler).

    CUDA with bf16 support: bf16. Older CUDA: fp16 with a loss scaler. CPU: fp32. amp() is the one autocast context.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {name}: {str(e).splitlines()[0]}")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.dtype != "auto":
        dtype, why = args.dtype, "--dtype"
    elif device.type != "cuda":
        dtype, why = "fp32", f"{device.type} gains little from less"
    else:
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype, why = ("bf16", "this GPU supports it") if bf16 else ("fp16", "this GPU lacks bf16; with a loss scaler")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return SimpleNamespace(
        device=device, dtype=dtype, why=why, rank=rank, world=world,
        amp=lambda: torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext(),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16))


def all_sum(values, run):
    """Sum a list of numbers over all ranks -> list of floats."""
    t = torch.tensor(values, dtype=torch.float32 if run.device.type == "mps" else torch.float64, device=run.device)
    if run.world > 1:
        dist.all_reduce(t)
    return t.tolist()


def wait_for_all(run):
    if run.world > 1:
        dist.barrier()


def say(run, *words):
    if run.rank == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


def make(args, **keywords):
    """The environment of --env; what it cannot use (say, damaged --data) ends in one line."""
    sight = dict(vl=True, visual=args.visual, pixels=args.pixels) if args.vl else {}
    try:
        return ENVS[args.env](seed=args.seed, data=args.data, **{**sight, **keywords})
    except ValueError as e:
        fail(e)


def home(args):
    """Where the task's runs live: out/gp, or out/gp-vl when the cards are seen."""
    return os.path.join(args.out, args.env + "-vl" * args.vl)


def trained_on(args):
    """Folder of the runs trained on --rule and, with --vl, --visual: out/gp/id, or out/gp-vl/id-ood."""
    return os.path.join(home(args), args.rule + (f"-{args.visual}" if args.vl else ""))


def base_of(args):
    """Folder of the tiny base. With pictures each look has its own, which knows the other look poorly."""
    return os.path.join(home(args), "base-ood" if args.visual == "ood" else "base")


def task_flags(args, method=None):
    """The flags that name the task and the model, for "next: ..." lines. method: "sft" or "ppo", if the compute shall
    be the same there."""
    same = not method or args.tokens == getattr(ENVS[args.env], method + "_vl" * args.vl)["tokens"]
    compute = "" if same else f" --tokens {args.tokens:g}"
    return (f"--env {args.env} --rule {args.rule}" + (f" --vl --visual {args.visual} --pixels {args.pixels}" * args.vl)
            + "".join(f" --{key} {getattr(args, key)}" for key, default in (
                ("out", "out"), ("seed", 0), ("data", None), ("model", None), ("init", None), ("verify", None))
                if getattr(args, key, default) != default) + compute)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: an ordinary transformers folder (+ trainer.pt), replaced in one rename.

FALLBACK_TEMPLATE = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}"
                     "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")


def checkpoint_at(path):
    """The checkpoint folder meant by `path`: a run folder stands for its checkpoint/. Undoes a save that was killed
    between its two renames."""
    for folder in (os.path.join(path, "checkpoint"), path):
        if not os.path.isdir(folder) and os.path.isfile(os.path.join(folder + ".old", "config.json")):
            with suppress(FileNotFoundError):  # another rank was faster
                os.rename(folder + ".old", folder)
        if os.path.isfile(os.path.join(folder, "config.json")):
            return folder
    return None


def load(path, device="cpu"):
    """-> (model in fp32 and eval mode, tokenizer). path: a folder of ours, or any folder or hub id transformers loads.

    A vision-language model is any that AutoModelForImageTextToText knows. Then tok.processor is its processor, or, if
    that needs a package that is not here (torchvision for Qwen2.5-VL), the reason as a str: tasks in words still run.
    model.generation_config keeps nothing but the end and padding ids and what must not be said: a released model's
    top-p or repetition penalty would make what is sampled differ from what PPO scores."""
    folder = checkpoint_at(path)
    if folder is None and (os.path.exists(path) or path.count("/") != 1 or os.path.exists(path.split("/")[0])):
        fail(f"no checkpoint at {path!r}: no config.json there")
    try:
        vision = AutoConfig.from_pretrained(folder or path).model_type in VLMS
        processor = load_processor(folder or path) if vision else None
        blind = processor is None or isinstance(processor, str)
        tok = AutoTokenizer.from_pretrained(folder or path) if blind else processor.tokenizer
        tok.chat_template = getattr(processor, "chat_template", None) or tok.chat_template  # the one with pictures
        kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model, report = kind.from_pretrained(folder or path, dtype=torch.float32, output_loading_info=True)
    except Exception as e:  # transformers, safetensors and tokenizers each raise their own kinds for a damaged file
        fail(f"cannot load a model from {path!r}: {str(e).strip().splitlines()[0] if str(e).strip() else repr(e)}")
    lost = set(report["missing_keys"]) | {str(m[0]) for m in report.get("mismatched_keys", ())}
    if lost:
        fail(f"{path!r} is incomplete: {len(lost)} weights are missing, {sorted(lost)[0]} first")
    eos = {tok.eos_token_id} | set(torch.tensor(model.generation_config.eos_token_id or []).flatten().tolist())
    eos = sorted(int(e) for e in eos - {None})
    if not eos:
        fail(f"the tokenizer of {path!r} has no end-of-sequence token")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token
    tok.processor = processor
    if tok.chat_template is None and vision:
        fail(f"{path!r}: no chat template in its processor" + (f", or out of reach: {processor}" if blind else ""))
    if tok.chat_template is None:
        print(f"{path}: its tokenizer has no chat template; using a plain 'user: ... assistant: ...' one", flush=True)
        tok.chat_template = FALLBACK_TEMPLATE
    # A model may not say the marks at which pictures are put in: they would be read as pictures that are not there.
    marks = {getattr(model.config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id")}
    most = model.get_output_embeddings().out_features  # Mllama's mark is beyond its vocabulary, so it cannot be said
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tok.pad_token_id,
                                               suppress_tokens=sorted(m for m in marks - {None} if m < most) or None)
    return model.to(device).eval(), tok


def load_processor(path):
    """The processor of a vision-language model, or a str with the reason why there is none here."""
    try:
        processor = AutoProcessor.from_pretrained(path)
        return processor if hasattr(processor, "image_processor") else f"{path} holds no image processor"
    except Exception as e:  # a package that is missing, a damaged file: each family raises its own kinds
        return (str(e).strip() or repr(e)).splitlines()[0]


def eyes(tok):
    """The processor of a vision-language model's tokenizer, None if there is none or it could not be loaded."""
    processor = getattr(tok, "processor", None)
    return None if isinstance(processor, str) else processor


def save(path, model, tok, state):
    """Write a checkpoint folder so that at every instant either the old or the new one is whole.

    path.tmp is written in full, then path -> path.old, path.tmp -> path, and path.old goes. state: trainer.pt's dict
    of tensors and plain values (read back with weights_only=True)."""
    tmp, old = path + ".tmp", path + ".old"
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        model.save_pretrained(tmp)
        (eyes(tok) or tok).save_pretrained(tmp)
        torch.save(state, os.path.join(tmp, "trainer.pt"))
        checkpoint_at(path)
        shutil.rmtree(old, ignore_errors=True)
        if os.path.isdir(path):
            os.rename(path, old)
        os.rename(tmp, path)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as e:  # a full disk shows as OSError, RuntimeError or SafetensorError, depending on the writer
        fail(f"cannot save to {path}: {e}; the checkpoint saved before is intact")


def load_state(path):
    """trainer.pt of a checkpoint, {} when it has none (a model from elsewhere)."""
    file = os.path.join(checkpoint_at(path) or path, "trainer.pt")
    if not os.path.isfile(file):
        return {}
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:
        fail(f"{file} is damaged: {str(e).splitlines()[0]}")


BOOKKEEPING = {"out", "name", "device", "dtype", "batch_rollout", "episodes", "monitors", "monitor_episodes", "saves",
               "log_every", "resume", "steps", "parent", "k", "base_tokens", "init_tokens", "max_new_tokens", "micro"}


def training_flags(args):
    """The flags that decide what a run learns, as a plain dict for trainer.pt."""
    base = {"chat_share", "row_tokens", "picture_share"} if getattr(args, "stage", None) != "base" else set()
    return {key: value for key, value in vars(args).items() if key not in BOOKKEEPING | base}


def same_flags(folder, args, only=None):
    """A finished or interrupted run is used again only for the flags it was made with; otherwise fail, naming them.
    only: the flags that must agree (default: all that both know)."""
    made = load_state(folder).get("flags", {})
    mine = training_flags(args)
    other = [f"--{k} {made[k]}" for k in (only or sorted(mine)) if k in made and k in mine and made[k] != mine[k]]
    if other:
        fail(f"{folder} was made with {' '.join(other)}; for other values choose another --name or --out")


# ----------------------------------------------------------------------------------------------------------------------
# From chat to tokens. What the model said is never tokenised again: text -> ids is not unique, and PPO must score the
# very tokens that were sampled.

MARK = "@@ANSWER@@"
PER_TOKEN = ("cross_attention_mask", "mm_token_type_ids", "token_type_ids")  # of a processor's outputs


def chat_text(tok, messages, images=(), **how):
    """A conversation in the chat template's words. For a vision-language model contents become lists of parts, and the
    images stand before the first user's text."""
    if getattr(tok, "processor", None) is not None:
        first = [m["role"] for m in messages].index("user")
        messages = [{"role": m["role"], "content": [{"type": "image"}] * (len(images) if i == first else 0)
                                                   + [{"type": "text", "text": m["content"]}]}
                    for i, m in enumerate(messages)]
    return tok.apply_chat_template(messages, tokenize=False, **how)


def encode(tok, text, images):
    """-> Segment of a text whose images stand at the processor's marks; ids hold all the places of each image."""
    if not images:
        return Segment(tok(text, add_special_tokens=False).input_ids)
    if eyes(tok) is None:
        why = getattr(tok, "processor", None)
        fail(f"--vl: the model's processor cannot be loaded: {why}" if why else
             "--vl needs a vision-language model, and this one reads text alone")
    inputs = dict(eyes(tok)(text=[text], images=list(images), add_special_tokens=False, return_tensors="pt"))
    ids, _ = inputs.pop("input_ids")[0].tolist(), inputs.pop("attention_mask")
    return Segment(ids, pictures=inputs)


def prompt(tok, messages, images=()):
    """-> Segment of a conversation up to where the assistant begins to speak."""
    return encode(tok, chat_text(tok, messages, images, add_generation_prompt=True), images)


def glue_ids(tok, messages, last_id=None):
    """Ids between the end of an answer and the beginning of the next one: end of turn, feedback, "assistant:".

    messages: [..., assistant, user]. The chat template is rendered with a mark in the answer's place; the glue is what
    follows the mark. last_id: the answer's last id; when that already is the end-of-turn token it is not repeated.

        said   ... 24 " }  <|end|>        glue   <|user|> The formula ... <|end|> <|assistant|>
        cut    ... 24 " }                 glue   <|end|> <|user|> The formula ... <|end|> <|assistant|>
    """
    probe = messages[:-2] + [{"role": "assistant", "content": MARK}] + messages[-1:]
    text = chat_text(tok, probe, add_generation_prompt=True)
    ids = tok(text.rpartition(MARK)[2], add_special_tokens=False).input_ids
    return ids[1:] if ids and ids[0] == last_id else ids


def answer_ids(tok, model, messages, text):
    """Ids of a demonstration: the answer and the token that ends a turn in this chat template."""
    closing = chat_text(tok, messages + [{"role": "assistant", "content": MARK}])
    first = tok(closing.rpartition(MARK)[2], add_special_tokens=False).input_ids[:1]
    eos = model.generation_config.eos_token_id
    return tok(text, add_special_tokens=False).input_ids + (first if first and first[0] in eos else eos[:1])


# ----------------------------------------------------------------------------------------------------------------------
# Rollout: sequential revision (paper, section 3). The model answers, the verifier judges, its words join the prompt.

@dataclass
class Segment:
    """One conversation as tokens. All lists have one entry per token. pictures: {name: tensor}, what the processor made
    of the images beside the ids (pixel_values, [images, 3, H, W] for LLaVA; others have more); {} without images.

        ids     <user> Make 24 ... <assistant>  {"cards" ... } <end>  <user> Wrong ... <assistant>  {"cards" ... } <end>
        action   0      0  0  0     0            1   1   1  1   1       0     0          0            1   1   1  1   1
        reward   0      0  0  0     0            0   0   0  0  -1       0     0          0            0   0   0  0   5
    """
    ids: list
    action: list = field(default_factory=list)
    reward: list = field(default_factory=list)
    pictures: dict = field(default_factory=dict)

    def add(self, ids, action):
        self.ids = self.ids + ids
        self.action += [action] * (len(self.ids) - len(self.action))
        self.reward += [0.0] * (len(self.ids) - len(self.reward))


@dataclass
class Episode:
    segments: list = field(default_factory=list)  # conversations, in order
    turns: list = field(default_factory=list)     # per answer: step()'s info + {"text", "tokens", "reward", "cut"}
    success: bool = False
    forwarded: int = 0  # tokens that went through the model while sampling: a later turn reads its conversation again


@torch.no_grad()
def rollout(model, tok, envs, seeds, temperature, max_new_tokens, run, batch=256, progress=None, keep_pictures=True):
    """Play one episode in each environment -> list of Episodes, in the order of envs. keep_pictures: False drops those
    of all conversations but an episode's first once they are over: they take memory, and only PPO needs them again.

    Sampling is plain: temperature, no top-k, no top-p. Prompts are padded on the left; environments that are done
    leave the batch. Randomness: torch's global generator. temperature 0 = greedy.
    """
    model.eval()
    end = set(model.generation_config.eos_token_id)
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=sorted(end), pad_token_id=tok.pad_token_id,
                              suppress_tokens=model.generation_config.suppress_tokens, **how)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    episodes, chats = [Episode() for _ in envs], []
    for env, seed, episode in zip(envs, seeds, episodes):
        messages, images = env.reset(seed)
        chats.append(messages)
        episode.segments.append(prompt(tok, messages, images))
    active = list(range(len(envs)))
    while active:
        still = []
        for start in range(0, len(active), batch):
            part = active[start:start + batch]
            prompts = [episodes[i].segments[-1].ids for i in part]
            width = max(map(len, prompts))
            if width + max_new_tokens > limit:
                fail(f"the model's context of {limit} tokens is too short: {width} of conversation + {max_new_tokens} "
                     "of answer; lower --verify or --max_new_tokens")
            ids = torch.tensor([[tok.pad_token_id] * (width - len(p)) + p for p in prompts])        # [B, width]
            seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])           # [B, width]
            pictures = join_pictures([episodes[i].segments[-1] for i in part], width, run.device, left=True)
            with run.amp():
                out = model.generate(input_ids=ids.to(run.device), attention_mask=seen.to(run.device),
                                     generation_config=config, **pictures)
            for i, row in zip(part, out[:, width:].tolist()):
                stop = next((n + 1 for n, token in enumerate(row) if token in end), len(row))
                said = row[:stop]                        # the end token, if any, is an action too
                cut = said[-1] not in end
                text = tok.decode(said if cut else said[:-1], skip_special_tokens=False)
                episode, segment = episodes[i], episodes[i].segments[-1]
                segment.add([], 0)
                segment.add(said, 1)
                step = envs[i].step(text)
                episode.forwarded += len(segment.ids)
                segment.reward[-1] = step.reward         # on the turn's last action token
                episode.turns.append({**step.info, "text": text, "tokens": stop, "reward": step.reward, "cut": cut})
                if not keep_pictures and step.info["position_done"] and len(episode.segments) > 1:
                    segment.pictures = {}
                if step.done:
                    episode.success = step.info["success"]
                    if progress:
                        progress.update()
                    continue
                still.append(i)
                if step.messages[:len(chats[i])] == chats[i]:   # the conversation goes on
                    segment.add(glue_ids(tok, step.messages, said[-1]), 0)
                else:                                           # a fresh one begins
                    episode.segments.append(prompt(tok, step.messages, step.images))
                chats[i] = step.messages
        active = still
    return episodes


def longest_answer(tok, model, args):
    """Default of --max_new_tokens: 1.25 x the longest of 64 demonstrations, in this tokenizer's tokens."""
    env, longest = make(args, rule=args.rule), 0
    for seed in range(64):
        messages, _ = env.reset(seed)
        while messages:
            answer = env.expert()
            longest = max(longest, len(answer_ids(tok, model, messages, answer)))
            messages = env.step(answer).messages
    return longest * 5 // 4


def join_pictures(segments, width, device, left=False):
    """The pictures of a batch as keywords for the model: joined along their first dimension (images, or patches), since
    all pictures of a task have one size. What has an entry per token (Mllama's cross_attention_mask, Qwen's
    mm_token_type_ids) is padded as the ids are; what comes after the prompt sees what the prompt's end saw."""
    joined = {}
    for name in dict.fromkeys(name for s in segments for name in s.pictures):
        parts = []
        for s in (s for s in segments if name in s.pictures):
            x = s.pictures[name]
            if name in PER_TOKEN:
                after = x[:, -1:].expand(-1, max(0, len(s.ids) - x.shape[1]), *x.shape[2:])
                padding = x.new_zeros(1, width - len(s.ids), *x.shape[2:])
                x = torch.cat([padding, x, after] if left else [x, after, padding], 1)
            parts.append(x)
        joined[name] = torch.cat(parts).to(device)
    return joined


def collate(segments, pad_id, device):
    """Pad segments on the right -> the model's inputs {input_ids [B, T] long, attention_mask [B, T] long, pictures'},
    action [B, T] bool."""
    width = max(len(s.ids) for s in segments)
    ids = torch.tensor([s.ids + [pad_id] * (width - len(s.ids)) for s in segments], device=device)
    attention = torch.tensor([[1] * len(s.ids) + [0] * (width - len(s.ids)) for s in segments], device=device)
    action = torch.tensor([s.action + [0] * (width - len(s.ids)) for s in segments], device=device, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": attention, **join_pictures(segments, width, device)}, action


def score(model, segments, pad_id, run, temperature=1.0, value_head=None):
    """What the model thinks of the action tokens of some segments -> logp [N], entropy [N], value [N] (None without a
    head), in fp32. N counts the action tokens of all segments in reading order; everything else is left out here, so
    no later line needs a mask.

    Token t is scored by position t - 1. With ids  p0 p1 a2 a3 f4 a5  and action 0 0 1 1 0 1, the logits of positions
    1, 2 and 4 are kept and score a2, a3 and a5. Logits are divided by the sampling temperature, so that this is the
    distribution that was sampled from.
    """
    inputs, action = collate(segments, pad_id, run.device)
    with run.amp():
        out = model(**inputs, output_hidden_states=value_head is not None)
    keep = action[:, 1:]                                                    # [B, T-1]
    logits = out.logits[:, :-1][keep].float() / temperature                 # [N, V]
    unsaid = model.generation_config.suppress_tokens or []                  # rollout() does not sample these
    if unsaid:
        logits = logits.index_fill(1, torch.tensor(unsaid, device=run.device), -1e9)
    logprobs = logits.log_softmax(-1)                                       # [N, V]
    said = inputs["input_ids"][:, 1:][keep]                                 # [N]
    logp = logprobs.gather(-1, said[:, None])[:, 0]                         # [N]
    entropy = -(logprobs.exp() * logprobs).sum(-1)                          # [N]
    value = None if value_head is None else value_head(out.hidden_states[-1][:, :-1][keep].float())[:, 0]  # [N]
    return logp, entropy, value


# ----------------------------------------------------------------------------------------------------------------------
# Success rates.

def rate(hits):
    """List of 0/1 -> {"p", "se", "n"} with the paper's binomial standard error; all 0 for an empty list. Of shares in
    [0, 1] the error is an upper bound."""
    n, p = len(hits), sum(hits) / max(1, len(hits))
    return {"p": p, "se": math.sqrt(p * (1 - p) / max(1, n)), "n": n}


@torch.no_grad()
def kl_to(reference, model, tok, episodes, args, run):
    """KL(model || reference) in nats per first answer, from the model's own samples: mean of the summed log-ratios."""
    temperature, total = args.temperature or 1.0, 0.0
    firsts = []
    for e in episodes:  # the first conversation, cut after its first answer
        s = e.segments[0]
        end = s.action.index(1) + e.turns[0]["tokens"]
        firsts.append(Segment(s.ids[:end], s.action[:end], pictures=s.pictures))
    for i in range(0, len(firsts), args.micro):
        part = firsts[i:i + args.micro]
        total += (score(model, part, tok.pad_token_id, run, temperature)[0]
                  - score(reference, part, tok.pad_token_id, run, temperature)[0]).sum().item()
    total, count = all_sum([total, len(firsts)], run)
    return total / count


def positions(episode):
    """The turns of an episode, grouped by position: [[turn, ...], ...]."""
    out = [[]]
    for turn in episode.turns:
        out[-1].append(turn)
        if turn["position_done"]:
            out.append([])
    return out[:-1]


def evaluate(model, tok, args, run, episodes, verify, reference=None, k=1):
    """Success rates of a model in the columns of the table -> {column: {...}}, each with
        "p", "se", "n"   share of positions (hands; steps of a route) solved within the attempts: any of k tries
        "first"          ... by the first attempt                     "episode"   share of whole episodes solved
        "matters"        {"p", ..., "first"} of the positions at which the two rules differ alone
        "working"        where the environment judges it, by first answers at those positions: the share whose working,
                         which comes before the action, is right (V-IRL: the current instruction), and "then": of these,
                         the share whose action is right too
        "other_rule"     share of first answers that follow the other rule, among those positions
        "verdicts"       shares among first answers                   "kl"        in column "id", given a reference
        "recognition"    with pictures, by first answers: the share of a picture's parts read right (cards; landmark,
                         side, intersection), and "whole": of pictures read right as a whole
    The same episodes for every model and seed: they depend on the episode's number only."""
    was_training, rng = model.training, torch.get_rng_state()
    out = {}
    for column, keywords in columns(args).items():
        torch.manual_seed(1_000_003 * (args.seed + 1) + run.rank)
        jobs = [i for i in range(episodes) for _ in range(k)][run.rank::run.world]  # each rank plays its share
        envs = [make(args, verify=verify, **keywords) for _ in jobs]
        played = rollout(model, tok, envs, [f"eval/{i}" for i in jobs], args.temperature, args.max_new_tokens, run,
                         args.batch_rollout, keep_pictures=False)
        records = [((i, j), e.success, turns[0], turns[-1]["position_solved"])
                   for i, e in zip(jobs, played) for j, turns in enumerate(positions(e))]
        if run.world > 1:
            gathered = [None] * run.world
            dist.all_gather_object(gathered, records)
            records = sum(gathered, [])

        def best(value, among=records):  # of the k tries at a position, the best one
            hits = {}
            for record in among:
                hits[record[0]] = max(hits.get(record[0], 0), int(value(record)))
            return rate(list(hits.values()))
        matters = [r for r in records if r[2]["rule_matters"]]
        verdicts = [r[2]["verdict"] for r in records]
        working = [r for r in matters if r[2].get("working") is not None]
        then = [int(r[2]["position_solved"]) for r in working if r[2]["working"]]
        read = [r[2]["recognized"] for r in records if r[2].get("recognized") is not None]
        out[column] = {
            **best(lambda r: r[3]), "first": best(lambda r: r[2]["position_solved"]),
            "episode": best(lambda r: r[1], [((i, 0), ok, turn, last) for (i, j), ok, turn, last in records if j == 0]),
            "matters": {**best(lambda r: r[3], matters), "first": best(lambda r: r[2]["position_solved"], matters)},
            "other_rule": rate([int(r[2]["other_rule"]) for r in matters]),
            "verdicts": {v: verdicts.count(v) / len(verdicts) for v in sorted(set(verdicts))}, "kl": None,
            **({"working": {**rate([int(r[2]["working"]) for r in working]), "then": rate(then)}} if working else {}),
            **({"recognition": {**rate(read), "whole": rate([int(x == 1) for x in read])}} if read else {})}
        if reference is not None and column == "id":
            out[column]["kl"] = kl_to(reference, model, tok, played, args, run)
    torch.set_rng_state(rng)
    model.train(was_training)
    return out


HEADS = {"seen": "seen", "id": "ID", "ood": "OOD", "visual": "visual OOD"}


def columns(args):
    """{column of the table: the episodes in it, as keywords of the environment}. The last, "visual", with pictures, and
    with --data only where that has another city (its folder "ood")."""
    cells = ENVS[args.env].cells(args.rule, *([args.visual] if args.vl else []))
    if args.data and args.visual == "id" and not os.path.isdir(os.path.join(args.data, "ood")):
        cells.pop("visual")
    return cells


def brief(cells):
    """{"seen": ..., "id": ..., "ood": ...} -> "seen .91 ID .40 OOD .12", for progress bars."""
    text = " ".join(f"{HEADS[c]} {cells[c]['p']:.2f}" for c in cells)
    return text + (f", read {cells['id']['recognition']['p']:.2f}" if "recognition" in cells["id"] else "")


def turns_alone(rows):
    """True where the rules differ at some positions only."""
    return any(0 < row["ood"].get("matters", row["ood"])["n"] < row["ood"]["n"] for row in rows)


def print_table(rows, args, verify, seeds=1):
    env, names = ENVS[args.env], [c for c in HEADS if c in rows[0]]
    other = "ood" if args.rule == "id" else "id"
    pm = lambda r: f"{100 * r['p']:5.1f} ± {100 * r['se']:3.1f}"
    print(f"\n{env.title}: trained rule = {args.rule} ({env.rule_names[args.rule]}), held out = {other} "
          f"({env.rule_names[other]})"
          + (f"; trained look = {args.visual} ({env.visual_names[args.visual]})" if args.vl else "")
          + "\nsuccess in %, ± one standard error" + (f" over {seeds} seeds" if seeds > 1 else "")
          + f"; {args.episodes} episodes a cell, T = {args.temperature:g}, within {verify} attempts"
          + (f", pass@{args.k}" if args.k > 1 else ""))
    # GeneralPoints has one block of columns. Where the rules differ at some positions only (V-IRL: at turns), two more.
    blocks = [("", lambda cell: cell)]
    if turns_alone(rows):
        blocks += [("where the rules differ", lambda cell: cell["matters"]),
                   ("whole episodes", lambda cell: cell["episode"])]
    if "working" in rows[0]["id"]:
        blocks += [("working right", lambda cell: cell["working"]),
                   ("then action right", lambda cell: cell["working"]["then"])]
    if args.vl:
        blocks += [("parts read right", lambda cell: cell["recognition"]),
                   ("pictures read right", lambda cell: cell["recognition"]["whole"])]
    for title, pick in blocks:
        head = [HEADS[c] + " *" * (c == "id") for c in names]
        head += [f"{HEADS[c].removesuffix(' OOD')} first" for c in names[1:] if "first" in pick(rows[0]["id"])]
        print(f"{title:22}|" + "".join(f"{name:^13}|" for name in head)
              + ("" if title else f"{'OOD by trained rule':^21}|{'KL to init':^11}"))
        for row in rows:
            cells = [pick(row[column]) for column in names]
            cells += [cell["first"] for cell in cells[1:] if "first" in cell]
            kl = row["id"]["kl"]
            print(f"{row['name']:22}|" + "".join(f" {pm(cell)} |" for cell in cells) + ("" if title else
                  f"{pm(row['ood']['other_rule']):^21}|{'' if kl is None else f'{kl:.2f}':^11}"))
    print("* the trained rule. seen = episodes trained on; ID, OOD = unseen ones. first: by the first attempt, as with "
          "--verify 1.\n  OOD by trained rule: first answers on the held-out rule that follow the trained one."
          + ("\n  working: by first answers where the rules differ, what stands before the action (V-IRL: the current "
             "instruction)\n  right in every letter; then: of these answers, those whose action is right too.")
          * ("working" in rows[0]["id"])
          + ("\n  visual OOD: unseen episodes, trained rule, other look. Read: by first answers, where the prompt does "
             "not tell.") * args.vl, flush=True)


def table(paths, args, run):
    """Evaluate checkpoints, print the table -> the dict that eval.json holds. paths: {name: path}. The model named
    init, if there, is the reference of the KL column."""
    verify = args.verify or ENVS[args.env].default_verify
    reference, its_tok = load(paths["init"], run.device) if "init" in paths else (None, None)
    rows = []
    bar = tqdm(paths.items(), desc="evaluate", disable=None if run.rank == 0 else True, leave=False)
    for name, path in bar:
        if args.vl:
            same_flags(path, args, ["pixels"])
        model, tok = load(path, run.device)
        most = args.max_new_tokens or longest_answer(tok, model, args)  # in this model's tokens
        related = reference is not None and len(tok) == len(its_tok)    # no KL between different vocabularies
        cells = evaluate(model, tok, SimpleNamespace(**{**vars(args), "max_new_tokens": most}), run, args.episodes,
                         verify, reference if related else None, args.k)
        bar.set_postfix_str(f"{name}: {brief(cells)}")
        rows.append({"name": name, "path": path, **cells})
    if run.rank == 0:
        print_table(rows, args, verify)
    return {"env": args.env, "vl": args.vl, "trained_rule": args.rule, "trained_visual": args.visual, "verify": verify,
            "temperature": args.temperature, "episodes": args.episodes, "k": args.k, "seed": args.seed, "rows": rows}


def spread(values):
    """Numbers of the seeds -> (mean, its standard error)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / max(1, n - 1) / n)


def over_seeds(files):
    """Tables of several seeds, one eval.json each -> printed: their mean with the standard error over the seeds, then
    the differences between models, paired by seed."""
    tables = []
    if len(files) < 2:
        fail("--seeds takes the tables of two seeds or more")
    for file in files:
        try:
            with open(file) as f:
                tables.append(json.load(f))
            tasks = [{key: tables[i][key] for key in ("env", "vl", "trained_rule", "trained_visual", "verify", "k",
                                                      "temperature", "episodes")} for i in (0, -1)]
            names = [[(row["name"], sorted(row["id"])) for row in tables[i]["rows"]] for i in (0, -1)]
            seed = tables[-1]["seed"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            fail(f"{file} is not a table of this script (eval.json, or a file of --json): {e!r}")
        if tasks[0] != tasks[1] or names[0] != names[1] or seed in [t["seed"] for t in tables[:-1]]:
            fail(f"{file} is not {files[0]} with another seed: task, settings, models and measures must agree, seeds "
                 "differ")

    def merge(cells):  # the same place of all tables
        if not isinstance(cells[0], dict):
            return cells[0] if isinstance(cells[0], (str, type(None))) else sum(cells) / len(cells)
        keys = dict.fromkeys(key for cell in cells for key in cell)
        merged = {key: merge([cell.get(key, 0) for cell in cells]) for key in keys}
        return {**merged, "se": spread([cell["p"] for cell in cells])[1]} if "p" in merged else merged
    rows = [merge(of_a_model) for of_a_model in zip(*(t["rows"] for t in tables))]
    first = tables[0]
    print_table(rows, SimpleNamespace(**first, rule=first["trained_rule"], visual=first["trained_visual"]),
                first["verify"], len(tables))
    print("Differences, paired by seed:")
    kinds = {"": lambda cell: cell, "first ": lambda cell: cell["first"]}
    if turns_alone(rows):
        kinds |= {"turns ": lambda cell: cell["matters"], "turns first ": lambda cell: cell["matters"]["first"]}
    if "working" in rows[0]["id"]:
        kinds |= {"working ": lambda cell: cell["working"], "then ": lambda cell: cell["working"]["then"]}
    if first["vl"]:
        kinds["read "] = lambda cell: cell["recognition"]
    for a, b in combinations(range(len(rows)), 2):
        for column in (c for c in HEADS if c in rows[0] and c != "seen"):
            parts = []
            for kind, pick in kinds.items():
                mean, se = spread([pick(t["rows"][b][column])["p"] - pick(t["rows"][a][column])["p"] for t in tables])
                parts.append(f"{kind}{100 * mean:+.1f} ± {100 * se:.1f}")
            print(f"{rows[b]['name'] + ' - ' + rows[a]['name']:22}| {HEADS[column]:10} " + ", ".join(parts))


def write_json(path, value):
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".tmp", "w") as f:
            json.dump(value, f, indent=1)
        os.replace(path + ".tmp", path)
    except OSError as e:
        fail(f"cannot write {path}: {e}")


def matmul_rate(model, device):
    """FLOP/s of an fp32 product shaped like this model's layers: [4096, hidden] @ [hidden, intermediate]."""
    config = model.config.get_text_config()
    a = torch.randn(4096, config.hidden_size, device=device)
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    b = torch.randn(config.hidden_size, width, device=device)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(10):
        a @ b
    sync()
    start = time.perf_counter()
    for _ in range(100):
        a @ b
    sync()
    return 100 * 2 * a.shape[0] * b.numel() / (time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------------------------------

def plot(files, picture, against="compute"):
    """Success against training compute, from metrics.jsonl files: one panel a task, mean over seeds, band of one SE.
    Where the rules differ at some positions only (V-IRL), at these. against="recognition": pictures' parts read right
    instead of compute (paper, figure 8)."""
    try:
        import matplotlib
    except ImportError:
        fail("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = {}  # (task, method) -> list of runs; a run is a list of monitor records
    for file in files:
        try:
            with open(file) as f:
                records = [json.loads(line) for line in f if line.endswith("}\n")]  # a running one's last may be half
            start, points = records[0], [r for r in records if "seen" in r]
            method = "SFT on own answers" if start.get("demos") == "own" else start["method"].upper()
            env, look = ENVS[start["env"]], start.get("visual")
            task = (f"{env.title}{'-VL' * bool(look)}, trained on {env.rule_names[start['rule']]}"
                    + (f", {env.visual_names[look]}" if look else ""))
            curves.setdefault((task, method), []).append(points)
            if not points:
                fail(f"{file}: its run has not got as far as a first success rate")
            if against == "recognition" and not all("recognition" in r["id"] for r in points):
                fail(f"{file} is of a run without pictures: it has no recognition")
        except (OSError, ValueError, KeyError, IndexError) as e:
            fail(f"{file} is not a metrics.jsonl of sft.py or rl.py: {e!r}")
    tasks = list(dict.fromkeys(task for task, _ in curves))
    fig, axes = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 3.9), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks):
        for (t, method), runs in sorted(curves.items()):
            if t != task:
                continue
            n, probe = min(map(len, runs)), runs[0][0]["ood"]
            turns = 0 < probe.get("matters", probe)["n"] < probe["n"]
            x = [sum(run[i]["flops"] for run in runs) / len(runs) / 1e12 for i in range(n)]
            for column, style in (("seen", ":"), ("id", "--"), ("ood", "-"), ("visual", "-.")):
                if column not in runs[0][0] or (against == "recognition" and column == "seen"):
                    continue
                cells = [[run[i][column] for i in range(n)] for run in runs]
                y = torch.tensor([[100 * (cell["matters"] if turns else cell)["p"] for cell in row] for row in cells])
                mean, se = y.mean(0), y.std(0) / len(runs) ** 0.5 if len(runs) > 1 else 0 * y[0]
                if against == "recognition":
                    x = torch.tensor([[100 * cell["recognition"]["p"] for cell in row] for row in cells]).mean(0)
                    style = {"--": "s--", "-": "o-", "-.": "^-."}[style]
                line, = ax.plot(x, mean, style, color={"SFT": "C3", "RL": "C0"}.get(method, "C7"),
                                label=f"{method} {HEADS[column]}")
                if against == "compute":
                    ax.fill_between(x, mean - se, mean + se, color=line.get_color(), alpha=0.15, linewidth=0)
        ax.set_title(task + ", turns" * turns, fontsize=10)
        ax.set_xlabel("fine-tuning compute, TFLOP" if against == "compute" else "parts of pictures read right, %")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("success within the attempts, %")
    lines, names = axes[0][0].get_legend_handles_labels()
    wide = min(len(names), 4 * len(tasks))  # entries in a line of the legend
    fig.tight_layout(rect=(0, 0.02 + 0.06 * math.ceil(len(names) / wide), 1, 1))
    fig.legend(lines, names, fontsize=8, ncol=wide, loc="lower center")
    try:
        fig.savefig(picture, dpi=130)
    except (OSError, ValueError) as e:
        fail(f"--plot {picture}: {e}")
    print("drawn:", picture, "from", len(files), "runs")


def found_checkpoints(args):
    """{name: path} of the usual stages below --out that exist, in the order they are trained."""
    places = {"base": args.model or base_of(args),
              **{stage: os.path.join(trained_on(args), stage) for stage in ("init", "sft", "rl")}}
    return {name: path for name, path in places.items() if path == args.model or checkpoint_at(path)}


def main(argv=None):
    parser = Parser(__doc__)
    add = shared_flags(parser)
    add("--models", nargs="+", metavar="PATH", default=None)  # checkpoints to compare; default: all stages found
    add("--k", type=positive(int), default=1)                 # episodes per hand; solved if any is (pass@k)
    add("--json", metavar="FILE", default=None)               # where the table goes; default: out/ENV/RULE/eval.json
    add("--seeds", nargs="+", metavar="FILE", default=None)   # tables of several seeds (files of --json) in one instead
    add("--plot", metavar="PNG", default=None)                # draw success against compute instead
    add("--against", choices=["compute", "recognition"], default="compute")  # the horizontal axis of --plot
    add("--metrics", nargs="+", metavar="FILE", default=None)  # metrics.jsonl files to draw; default: all under --out
    args = parser.parse_args(argv)
    if args.plot:
        below = home(args)
        files = args.metrics or [os.path.join(folder, "metrics.jsonl") for folder, _, names in sorted(os.walk(below))
                                 if "metrics.jsonl" in names and os.path.basename(folder) in ("sft", "rl")]
        if not files:
            fail(f"no metrics.jsonl of an sft or rl run below {below}")
        return plot(files, args.plot, args.against)
    if args.seeds:
        return over_seeds(args.seeds)
    run = setup(args)
    if args.models:
        names = [os.path.basename(os.path.normpath(p)) for p in args.models]
        paths = {n if names.count(n) == 1 else os.path.relpath(p, home(args)): p for n, p in zip(names, args.models)}
    else:
        paths = found_checkpoints(args)
    if not paths:
        fail(f"no checkpoints under {home(args)}; train one: python rl.py {task_flags(args)}")
    result = table(paths, args, run)
    if run.rank == 0:
        file = args.json or os.path.join(trained_on(args), "eval.json")
        write_json(file, result)
        print("written:", file)


if __name__ == "__main__":
    script(main)
