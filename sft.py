"""sft.py: supervised fine-tuning, and the pretraining of the tiny base it starts from. One loop does both.

    python sft.py --env gp --stage base            # tiny model + tokenizer from scratch      -> out/gp/base
    python sft.py --env gp --rule id --stage init  # the short SFT that RL starts from       -> out/gp/id/init
    python sft.py --env gp --rule id               # SFT from the init at RL's compute       -> out/gp/id/sft
    python sft.py --env gp --rule id --name own --demos own      # right answers of the init as demonstrations
    python sft.py --env virl --vl --visual id --rule id          # from pictures -> out/virl-vl/id-id/sft
    python sft.py --model Qwen/Qwen2.5-0.5B-Instruct --out out/qwen    # a real model, with rates of its own
    torchrun --nproc_per_node=2 sft.py --rule id    # several devices
A stage whose input is missing builds it first, by that stage's defaults. A finished run is not trained again:
give a new --name for other flags. --resume continues one that was interrupted (Ctrl-C and SIGTERM save), or a
finished one to a larger --tokens (but no finished init, which keeps no optimizer).

The loss (paper, section 3): -log pi(answer | prompt), averaged over the answer's tokens and the token that
ends the turn. Prompts carry no loss. In pretraining all but a row's first token and pictures is "answer".

Who writes the demonstrations (--demos) decides what SFT does:
    expert   a right answer in another style than the model's. GeneralPoints: any one of a hand's solutions,
             always the same for a hand. V-IRL: the current instruction in shorthand.
    habit    what the base would write: the shortest solution; the instruction word by word.
    own      the init's own right answers to the training episodes, sampled once.

Compute (paper, appendix): X = 6 N D, for N parameters and D tokens trained on. Budgets (--tokens) are X / 6N,
so the same number in rl.py is the same compute. A budget leaves the init out; logged flops begin with it.

Metrics, one record a step in metrics.jsonl: loss (nats per answer token; falls, to the entropy of the
demonstrations), grad_norm (before clipping), lr, tokens_per_s, flops and tokens (cumulative, with the
init's), memory_gb (peak). Records with seen / id / ood hold success rates.

Departures from the authors' release: README.md lists them. Left out: sequence packing for SFT, LoRA.
"""
import json
import math
import os
import random
import signal
import sys
import time
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm
try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: no lock on a run's folder, no peak memory
    fcntl = resource = None
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Tokenizer, PreTrainedTokenizerFast

from eval import (BOOKKEEPING, ENVS, HEADS, Segment, all_sum, answer_ids, base_of, chat_text, checkpoint_at,
                  columns, demonstrations, encode, evaluate, fail, first_line, forward, found_checkpoints,
                  gathered, in_step, load, load_state, longest_answer, make, measured, micro_batches,
                  new_parser, of_all_ranks, parse, place, prompt, restore, rollout, same_flags, save, say,
                  script, setup, table, task_flags, trained_on, write_json)

# Hyper-parameters. A tuple has a column for each task, a number serves all. Some are also flags: see flags().
TASKS =                  ("gp",   "gp-vl", "virl", "virl-vl")
BASE = {
    "tokens":            (3.2e6,  5.0e6,   1.5e6,  3.0e6),   # compute X / 6N
    "batch":             (32,     21,      16,     16),      # rows of documents a step
    "row_tokens":        (128,    192,     256,    256),     # width of a row
    "chat_share":        (0.08,   0.12,    0.15,   0.15),    # documents in the task's chat form
    "picture_share":     (0.0,    0.5,     0.0,    0.5),     # documents with pictures
    "lr":                (3e-3,   3e-3,    1e-2,   1e-2),    # AdamW: embeddings, norms
    "muon_lr":           0.02,                               # Muon: the matrices inside the blocks
    "vision_rate":       (1.0,    0.1,     1.0,    0.1),     # vision rates times this; at 0.3 some never read
    "warmup":            50,                                 # steps of linear warm-up
    "decay":             0.4,                                # last share of the budget with lr going to 0
    "monitors":          3,                                  # success rates are measured this often a run
    "micro_tokens":      2048,                               # tokens a forward pass, padding included
}
SFT = {
    "tokens":            (8e5,    8e5,     6e5,    6e5),     # compute X / 6N, the same as PPO's
    "batch":             (128,    128,     16,     16),      # episodes a step: hands, or routes of ~8 rows
    "lr":                (2e-4,   2e-4,    2e-3,   2e-3),    # AdamW; without pictures chosen by ID
    "muon_lr":           0.0,
    "vision_rate":       1.0,
    "warmup":            5,
    "decay":             0.0,
    "monitors":          6,
    "micro_tokens":      2048,
}
INIT = {
    **SFT,
    "tokens":            8e4,                                # enough to take on the expert's style
    "lr":                (1e-3,   1e-3,    1e-4,   1e-4),
}
# What differs for a model from elsewhere (--model), in SFT and PPO. Never tried at size: no GPU was at hand.
REAL = {"tokens": 1e7, "batch": 64, "lr": 1e-6, "micro_tokens": 4096}
REAL_INIT = {**REAL, "tokens": 1e6}
STAGES = {"base": BASE, "init": INIT, "sft": SFT}
MONITOR_EPISODES = 100  # per column, for success rates on the way
SAVES = 4               # checkpoints a run
CLIP_GRAD = 1.0         # gradient norm is clipped to this
OWN_EPISODES = 4096     # training episodes that the init plays for --demos own
TINY = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True)
# V-IRL's current instruction has to be looked up. A first layer that sees only the token and the three before
# it, and normalised queries and keys, let a tiny model learn that sooner. Both are stock parts of Qwen3.
TINY_CLASS = {"virl": dict(model_type="qwen3", use_sliding_window=True, sliding_window=4,
                           layer_types=["sliding_attention", "full_attention", "full_attention"])}


def fill_in(args, hyper_parameters):
    """Give args the hyper-parameters that no flag has set, from its task's column (a new task: the first)."""
    task = args.env + "-vl" * args.vl
    column = TASKS.index(task) if task in TASKS else 0
    for name, default in hyper_parameters.items():
        if getattr(args, name, None) is None:
            setattr(args, name, default[column] if isinstance(default, tuple) else default)


# ------------------------------------------------------------------------------------------------------------
# The tiny model: 0.6M parameters, an ordinary Llama or Qwen3 with a byte-level BPE tokenizer trained on the
# task's phrases. With pictures: an ordinary LLaVA of 1.1M around it.

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def build_tiny(env_name, seed, vl=False, pixels=80):
    """-> (causal language model with random weights, tokenizer). Any text can be encoded (256 bytes are in
    the vocabulary). The environment's phrases become a token or two each: BPE may merge across spaces here.

    vl: -> LlavaForConditionalGeneration, the same model behind a CLIP vision tower. Patches are pixels / 4
    wide: a picture is 16 tokens. tok.processor resizes and normalises pictures with Pillow and NumPy."""
    trainee = GPT2Tokenizer()
    trainee.backend_tokenizer.pre_tokenizer.use_regex = False  # do not split at words before merging
    trained = trainee.train_new_from_iterator(
        [ENVS[env_name].fragments(vl)], vocab_size=2000, show_progress=False, min_frequency=1,
        new_special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
        + ["<image>"] * vl)
    tok = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)
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
    """Prompt without loss, answer and end of turn with it. The prompt's ids are those of a rollout.

        ids      <user> Make 24 ... <assistant>  {"cards" ... } <end>
        mask      0      0  0  0     0            1   1   1  1   1"""
    row = prompt(tok, messages, images)
    row.add(answer_ids(tok, model, messages, answer), 1)
    return row


def pretraining_rows(env, tok, rng, count, row_tokens, chat_share, picture_share=0.0, pixels=80, rare="ood"):
    """`count` rows of at most row_tokens tokens, each filled with whole documents. All tokens have loss but a
    row's first and the places of pictures. rare: the look that only a tenth of the pictures have."""
    rows, spare, image_id = [], [], tok.convert_tokens_to_ids("<image>")  # None if it reads text alone
    while len(rows) < count:
        ids, pixel_values = [], []
        while True:
            if not spare:
                for _ in range(16):  # what is left of them when the last row is full is thrown away
                    if picture_share and rng.random() < picture_share:
                        doc, images = env.picture_document(rng, chat_share, pixels=pixels, rare=rare)
                    else:
                        doc, images = env.document(rng, chat_share), []
                    text = doc + tok.eos_token if isinstance(doc, str) else chat_text(tok, doc, images)
                    spare.append(encode(tok, text, images))
            if ids and len(ids) + len(spare[-1].ids) > row_tokens:
                break
            ids += spare[-1].ids
            pixel_values += spare.pop().pictures.values()
        ids = ids[:row_tokens]
        rows.append(Segment(ids, [int(i > 0 and token != image_id) for i, token in enumerate(ids)]))
        if pixel_values:
            rows[-1].pictures = {"pixel_values": torch.cat(pixel_values)}
    return rows


def own_demonstrations(path, args, run):
    """The init's right first answers to training episodes -> ([an episode's rows, ...], tokens forwarded).
    Each rank plays its share of the episodes; its rows are those, and the tokens are all ranks'."""
    model, tok = load(path, run.device, run.weights)
    torch.manual_seed(args.seed + run.rank)
    seeds = [f"own/{args.seed}/{i}" for i in range(run.rank, OWN_EPISODES, run.world)]
    envs = [make(args, rule=args.rule, split="train", verify=1) for _ in seeds]
    episodes = rollout(model, tok, envs, seeds, 1.0, args.max_new_tokens, run)
    right = [[s for s, t in zip(e.segments, e.positions()) if t[0]["position_solved"]] for e in episodes]
    if not any(right):
        fail(f"{path} solves no training episode, so --demos own has nothing to learn from")
    return [rows for rows in right if rows], all_sum([sum(e.forwarded for e in episodes)], run)[0]


def sft_loss(model, rows, denominator, pad_id, run):
    """Sum of the negative log-likelihoods of the action tokens / denominator -> scalar, fp32."""
    _, logits, _, said = forward(model, rows, pad_id, run)                  # [N, V], [N]
    return torch.nn.functional.cross_entropy(logits, said, reduction="sum") / denominator


def recompute_activations(model):
    """Keep each block's input alone, and run the block again in the backward pass (activation checkpointing).
    transformers does so in train() mode only. PPO wants no dropout, so it is set to 0, for SFT too."""
    try:
        model.activation_checkpointing_enable()
    except ValueError as e:
        fail(f"--activation_checkpointing: {first_line(e)}")
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


# ------------------------------------------------------------------------------------------------------------
# What stands around a training step, in sft.py and rl.py alike: budget, monitors, log, checkpoints, Ctrl-C.

class Loop:
    """One run. The training loop is `while loop.goes_on(): ...; loop.step_done(...)`, then loop.close().

    step, flops: so far. progress: spent share of the budget. extra: () -> dict, more for trainer.pt."""

    def __init__(self, args, run, folder, source, model, tok, extra):
        self.name = name = args.stage
        self.args, self.run, self.source = args, run, source
        self.model, self.tok, self.extra = model, tok, extra
        self.checkpoint = os.path.join(folder, "checkpoint")
        state = load_state(self.checkpoint)
        if state and not args.resume:
            fail(f"{folder}: another command has trained this run in the meantime")
        if state.get("world", run.world) != run.world:
            fail(f"--resume: {folder} was trained by {state['world']} processes, and this is {run.world}: "
                 "its batches would be others")
        if state.get("scaler"):  # {} of a run without one
            run.scaler.load_state_dict(state["scaler"])
        args.max_new_tokens = (args.max_new_tokens or state.get("max_new_tokens")
                               or longest_answer(tok, model, args, source))
        self.n = sum(p.numel() for p in model.parameters())
        start = load_state(source) if source else {}
        spent = start.get("flops", 0.0) if start.get("stage", "base") != "base" else 0.0  # since the base
        self.start_flops = state.get("start_flops", spent)
        self.step, self.flops = state.get("step", 0), state.get("flops", self.start_flops)
        self.budget = 6 * self.n * args.tokens
        # Monitors stand at equal steps of compute. The first measures the init, for its row in the table.
        # The last is the final table itself: command(). A base skips the first, and an init has none.
        self.next_monitor = min(state.get("next_monitor", int(name == "base")),
                                math.floor(self.progress * args.monitors) + 1)  # for a larger --tokens
        self.monitor_text, self.tokens, self.seconds = "", 0, 0.0
        self.interrupted = self.stops = False  # this rank has got a signal; one of all has
        say(run, f"[{name}] {args.env}, rule {args.rule}: {self.n / 1e6:.3f}M parameters, {self.budget:.3g} "
                 f"FLOP on {run.device} x {run.world} in {str(run.dtype)[6:]} ({run.why}) -> {folder}")
        if args.from_elsewhere:
            say(run, f"[{name}] a model from elsewhere, so with", *(f"--{n} {getattr(args, n):g}" for n in (
                "lr", "tokens", "batch", "micro_tokens", "max_new_tokens")))
        self.log = os.path.join(folder, "metrics.jsonl")
        if run.rank == 0:  # on resume, records after the checkpoint's step are dropped
            kept = [r for r in read_log(self.log) if r.get("step", 0) <= self.step] if state else []
            with open(self.log + ".tmp", "w", encoding="utf-8") as f:
                f.writelines(json.dumps(r) + "\n" for r in kept or [{"run": name, "n": self.n, **vars(args)}])
            os.replace(self.log + ".tmp", self.log)
        self.bar = tqdm(total=100, desc=name, disable=None if run.rank == 0 else True,
                        bar_format="{desc} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining} {postfix}")
        self.signals_before = {s: signal.signal(s, self.interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        self.start = self.step_start = time.perf_counter()

    @property
    def progress(self):
        return (self.flops - self.start_flops) / self.budget

    def interrupt(self, *_):
        """Ctrl-C or SIGTERM asks for a save and a stop after the current step; a second Ctrl-C stops at once.
        A second SIGTERM does not: clusters send it to torchrun and to its ranks."""
        self.interrupted = True
        signal.signal(signal.SIGINT, self.signals_before[signal.SIGINT])
        print("\nstopping after this step, then saving; Ctrl-C again stops at once", flush=True)

    def goes_on(self):
        """Measure success where a monitor is due -> False when budget or --steps are used up or on Ctrl-C."""
        args, over = self.args, self.progress >= 1
        if self.name != "init" and self.next_monitor <= self.progress * args.monitors and not over:
            first = self.step == 0
            episodes, reference = (args.episodes, self.model) if first else (MONITOR_EPISODES, None)
            cells = evaluate(self.model, self.tok, args, self.run, episodes, reference)
            if first:
                measured[os.path.abspath(self.source)] = cells
            self.next_monitor = math.floor(self.progress * args.monitors) + 1
            self.monitor_text = " ".join(f"{HEADS[c]} {cells[c]['p']:.2f}" for c in cells)  # seen 0.91 ...
            if "recognition" in cells["id"]:
                self.monitor_text += f", read {cells['id']['recognition']['p']:.2f}"
            say(self.run, f"[{self.name}] step {self.step:4d} {100 * self.progress:3.0f}% "
                          f"{self.monitor_text} (held-out first answers by the trained rule: "
                          f"{cells['ood']['other_rule']['p']:.2f}) {time.perf_counter() - self.start:.0f} s")
            self.write(cells)
        self.stops = all_sum([self.interrupted], self.run)[0] > 0  # all ranks leave at the same step
        self.step_start = time.perf_counter()
        return not (self.stops or over or args.steps and self.step >= args.steps)

    def step_done(self, flops, tokens, record, text):
        """Count a step: its compute, the tokens it trained on, its metrics, and what the bar shows."""
        seconds, before = time.perf_counter() - self.step_start, self.progress
        self.step, self.flops = self.step + 1, self.flops + flops
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.bar.update(min(100, 100 * self.progress) - self.bar.n)
        self.bar.set_postfix_str(f"{text} {self.monitor_text}")
        self.write({**record, "tokens_per_s": tokens / seconds, "seconds": seconds,
                    "memory_gb": peak_memory_gb(self.run)})
        if math.floor(before * SAVES) < math.floor(self.progress * SAVES) and self.progress < 1:
            self.save()

    def write(self, record):
        if self.run.rank == 0:
            counted = {"step": self.step, "flops": self.flops, "tokens": self.flops / 6 / self.n}
            with open(self.log, "a", encoding="utf-8") as f:
                f.write(json.dumps({**counted, **record}) + "\n")

    def save(self):
        if self.run.world > 1 and not self.run.sharded:  # they start equal and see the same gradients
            sums = [p.detach().double().sum().item() for p in self.model.parameters()]
            if any(s != sums for s in of_all_ranks(sums, self.run)):
                fail("the ranks' parameters differ")
        done = self.progress >= 1
        extra = {} if done and self.name == "init" else self.extra()  # a finished init is final
        weights, extra = gathered([self.model.state_dict(keep_vars=True), extra], self.run)
        flags = {key: x for key, x in vars(self.args).items() if key not in BOOKKEEPING}
        if self.run.rank == 0:
            save(self.checkpoint, self.model, self.tok, {
                "stage": self.name, "step": self.step, "flops": self.flops, "start_flops": self.start_flops,
                "done": done, "next_monitor": self.next_monitor, "world": self.run.world, "flags": flags,
                "max_new_tokens": self.args.max_new_tokens, "scaler": self.run.scaler.state_dict(),
                **extra}, weights)
        self.stops = all_sum([self.interrupted], self.run)[0] > 0  # this also waits until rank 0 has saved

    def close(self):
        self.bar.close()
        self.save()
        for number, handler in self.signals_before.items():
            signal.signal(number, handler)
        if self.seconds:
            say(self.run, f"[{self.name}] {self.tokens / self.seconds:,.0f} tokens/s, peak memory "
                          f"{peak_memory_gb(self.run):.1f} GB, {time.perf_counter() - self.start:.0f} s")
        if self.stops:
            say(self.run, f"stopped at step {self.step} and saved; go on with --resume")
            raise SystemExit(130)


@contextmanager
def lock(folder, run):
    """Within, no other command trains in this folder: two would write the same files. The system frees a lock
    when its process ends, however it ends. Some network file systems have no locks: there it does nothing."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as file:
        try:
            if fcntl and run.rank == 0:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another command is training in {folder}: wait for it, or choose another --name or --out")
        except OSError:
            pass
        yield


def read_log(file):
    """metrics.jsonl -> [record, ...], [] without one. Lines damaged by a kill or a full disk are left out."""
    records = []
    with suppress(FileNotFoundError), open(file, encoding="utf-8", errors="replace") as f:
        for line in f:
            with suppress(ValueError):
                records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict)]


def peak_memory_gb(run):
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device) / 2 ** 30
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2 ** 10  # bytes on a Mac, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def clip_and_step(parameters, optimizers, run, where):
    """Gradients summed over all ranks -> unscale -> clip -> step. -> the norm before clipping.

    Losses are divided by the global token count already. No step is taken on a gradient that is not finite.
    With a loss scaler that is routine: its scale goes down. Without one the run ends."""
    if run.world > 1 and not run.sharded:  # sharded, backward() has summed them
        for p in parameters:
            if p.grad is None:  # a rank whose batch had nothing for it still takes part
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters]
        summed = parameters_to_vector(gradients)  # in one message
        dist.all_reduce(summed)
        vector_to_parameters(summed, gradients)
    for o in optimizers:
        run.scaler.unscale_(o)
    norm = clip_grad_norm_(parameters, CLIP_GRAD).item()
    if math.isfinite(norm):  # GradScaler alone skips only the optimizers with a bad entry
        for o in optimizers:
            run.scaler.step(o)
    elif not run.scaler.is_enabled():
        fail(f"the gradient is not finite at {where} (dtype {run.dtype}); the last checkpoint is intact")
    run.scaler.update()
    return norm


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest (semi-)orthogonal matrix (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon): all directions of a matrix are learnt at about the same speed.

    Five Newton-Schulz steps push all singular values of the update towards 1. This is torch.optim.Muon but for
    two things, which make it 15 times faster on a laptop: it computes in fp32 (torch's casts to bfloat16, which
    CPUs without such instructions emulate), and matrices of one shape are stacked, tall ones transposed.

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


def train(args, run, source, folder):
    """Train one stage. source: the model to start from, None to build the tiny one. folder: the run's."""
    checkpoint = os.path.join(folder, "checkpoint")
    state = load_state(checkpoint, whole=True) if args.resume else {}  # {} too if nothing is saved there
    if state and "optimizers" not in state:
        fail(f"--resume: {checkpoint} is a finished init, which keeps no optimizer")
    if state or source:
        model, tok = load(checkpoint if state else source)
    else:
        model, tok = build_tiny(args.env, args.seed, args.vl, args.pixels)
    if args.activation_checkpointing:
        recompute_activations(model)
    place(model, run, run.dtype, args.shard and args.stage != "base")
    env = make(args, rule=args.rule, split="train")

    # ---- optimizers: Muon for the matrices inside the blocks when the stage asks for it, AdamW for the rest.
    # Vision tower and projector may learn at other rates. matrices: True for Muon's share, False for AdamW's.
    def groups(matrices, lr):
        named = [(name, p) for name, p in model.named_parameters() if matrices == (
            args.muon_lr > 0 and p.ndim == 2 and "embed" not in name and "lm_head" not in name)]
        vision = [any(w in name for w in ("vision", "visual", "projector", "connector")) for name, _ in named]
        halves = [([p for (_, p), v in zip(named, vision) if not v], lr),
                  ([p for (_, p), v in zip(named, vision) if v], lr * args.vision_rate)]
        return [{"params": params, "lr": rate, "peak_lr": rate} for params, rate in halves if params]
    optimizers = [torch.optim.AdamW(groups(False, args.lr), betas=(0.9, 0.98), weight_decay=0.0,
                                    foreach=False)]  # True, the default on CUDA, takes 4 bytes a weight more
    if matrices := groups(True, args.muon_lr):
        optimizers.append(Muon(matrices, args.muon_lr))
    for i, o in enumerate(optimizers if state else []):
        restore(o, state["optimizers"][i])
    del state  # the optimizer holds its tensors
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]

    loop = Loop(args, run, folder, source, model, tok,
                lambda: {"optimizers": [o.state_dict() for o in optimizers]})
    own = None
    if args.demos == "own" and args.stage != "base":
        own, generated = own_demonstrations(source, args, run)
        loop.flops = max(loop.flops, loop.start_flops + 2 * loop.n * generated)  # after a resume: already in
        if loop.step == 0 and loop.progress >= 1:
            fail(f"--demos own: to sample {OWN_EPISODES} episodes costs as much as {generated / 3:,.0f} tokens "
                 "of training; --tokens must be more")
        say(run, f"[{args.stage}] {sum(map(len, own))} right answers of the init in {OWN_EPISODES} episodes: "
                 "these are the demonstrations")

    while loop.goes_on():
        # ---- batch: a function of (seed, step, rank) alone, so resuming needs no generator state
        rng = random.Random(f"{args.stage}/{args.seed}/{loop.step}/{run.rank}")
        torch.manual_seed(rng.randrange(2 ** 31))
        if args.stage == "base":
            rows = pretraining_rows(env, tok, rng, args.batch, args.row_tokens, args.chat_share,
                                    args.picture_share, args.pixels, "id" if args.visual == "ood" else "ood")
        elif own:
            rows = [row for episode in rng.sample(own, min(args.batch, len(own))) for row in episode]
        else:
            rows = [demonstration_row(tok, model, *shown) for i in range(args.batch) for shown in
                    demonstrations(env, f"sft/{args.seed}/{loop.step}/{run.rank}/{i}", args.demos)]

        # ---- learning rate: linear warm-up, then constant, then to zero over the last share of the budget
        factor = min(1, (loop.step + 1) / args.warmup)
        factor *= min(1, (1 - loop.progress) / args.decay if args.decay else 1)
        for o in optimizers:
            o.zero_grad(set_to_none=True)
            for group in o.param_groups:
                group["lr"] = group["peak_lr"] * factor

        # ---- loss and gradient, one denominator for the whole batch over all micro-batches and ranks
        counts = [sum(sum(r.action_mask) for r in rows), sum(len(r.ids) for r in rows)]
        loss_tokens, tokens = all_sum(counts, run)
        model.train()
        loss = 0.0
        for part, weight in in_step(micro_batches(rows, args.micro_tokens), run):
            part_loss = weight * sft_loss(model, part, loss_tokens, tok.pad_token_id, run)
            run.scaler.scale(part_loss).backward()
            loss += part_loss.item()
        loss = all_sum([loss], run)[0]
        if not math.isfinite(loss):
            fail(f"loss is {loss} at step {loop.step} (lr {args.lr:g}, dtype {run.dtype}); "
                 "the last checkpoint is intact")
        norm = clip_and_step(parameters, optimizers, run, f"step {loop.step}")
        loop.step_done(6 * loop.n * tokens, tokens, {"loss": loss, "grad_norm": norm, "lr": args.lr * factor},
                       f"loss {loss:.3f}")
    loop.close()


def flags():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--stage", choices=STAGES, default="sft")  # base -> init -> sft
    add("--init", metavar="PATH")                  # start of the sft stage; default: built
    add("--name")                                  # the run's folder; default: the stage's name
    add("--demos", choices=["expert", "habit", "own"], default="expert")  # who writes the demonstrations
    add("--tokens", type=float)                    # compute X / 6N, in trained tokens
    add("--steps", type=int)                       # stop after this many steps at the latest
    add("--batch", type=int)                       # episodes (base: rows of documents) a step and rank
    add("--lr", type=float)                        # of AdamW
    add("--monitors", type=int)                    # success rates are measured this often a run
    add("--resume", action="store_true")           # continue an interrupted run
    add("--shard", action="store_true")            # spread weights, gradient, optimizer over torchrun's ranks
    add("--activation_checkpointing", action="store_true")  # less memory for activations, a third more time
    return parser


def run_stage(args, run, training, on_the_way=False):
    """Train args.stage by training(), from the stage before it, which is built if missing -> its folder.

    A finished run is not trained again. One made with other flags is an error, and so is an unfinished one
    without --resume. on_the_way: asked for by a later stage. Then it goes on by itself, and only few of the
    flags it was made with count. All rules and writers share a base."""
    stage = args.stage
    if args.from_elsewhere:
        fill_in(args, REAL_INIT if stage == "init" else REAL)
    fill_in(args, STAGES.get(stage, {}))  # rl.py has filled in its own
    folder = base_of(args) if stage == "base" else os.path.join(trained_on(args), args.name or stage)
    if checkpoint_at(folder):
        state, counted = load_state(folder), ["model", "seed", "pixels"] + ["data"] * (stage != "base")
        if state.get("stage") != stage:
            fail(f"{folder} was not saved by this stage of this script: choose another --name or --out")
        if not on_the_way:  # None: all flags
            counted = counted + ["tokens", "batch", "lr"] if stage == "base" else None
        same_flags(folder, args, counted)
        if state.get("done") and not args.resume:
            say(run, f"[{stage}] found, not trained again: {folder}")
            return folder
        if not args.resume and not on_the_way:
            fail(f"{folder} holds an unfinished run: continue it with --resume, or choose another --name or "
                 "--out")
        args.resume = True
    source = None
    if stage == "init":
        source = args.model or build(args, run, "base")
    elif stage != "base":
        source = args.init or build(args, run, "init")
    with lock(folder, run):
        training(args, run, source, folder)
    return folder


def build(args, run, stage):
    """Run an earlier stage with its defaults and this run's shared flags -> its folder."""
    earlier = flags().parse_args([])
    for name in [*vars(new_parser("").parse_args([])), "shard", "activation_checkpointing", "from_elsewhere"]:
        setattr(earlier, name, getattr(args, name))
    earlier.stage = stage
    if stage == "base":
        earlier.max_new_tokens = None
    return run_stage(earlier, run, train, on_the_way=True)


def command(args, training, following):
    """What sft.py or rl.py does: its stage, then the table, which is also the run's eval.json and the last
    record of its metrics.jsonl. following: the command to go on with."""
    run = setup(args)
    for keywords in columns(args).values():  # damaged --data shows before the training
        make(args, **keywords)
    folder = run_stage(args, run, training)
    others = ["base", "init", "sft" if args.stage == "rl" else "rl"] * (args.stage != "base")
    paths = {name: path for name, path in found_checkpoints(args).items() if name in others}
    if args.init:  # the other method's run began at another one
        paths = {"init": args.init, **{n: p for n, p in paths.items() if n == "base" and p != args.init}}
    result = table({**paths, args.name or args.stage: folder}, args, run)
    if run.rank == 0:
        write_json(os.path.join(folder, "eval.json"), result)
        row = next(row for row in result["rows"] if row["path"] == folder)
        log = os.path.join(folder, "metrics.jsonl")
        last = (read_log(log) or [{}])[-1]
        if "loss" in last or "reward" in last:  # else the row stands there already
            record = {name: last[name] for name in ("step", "flops", "tokens")}
            record.update({column: row[column] for column in columns(args)})
            with open(log, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
    say(run, "next:", following)


def main(argv=None):
    args = parse(flags(), argv)
    if args.stage == "base" and args.model:
        fail("--stage base trains the tiny model from nothing, --model brings one: begin at --stage init")
    if args.name and args.stage == "base":
        fail("--name: a base has its own place below --out; for another one choose another --out")
    if args.init and args.stage != "sft":
        fail(f"--init is where --stage sft starts; --stage {args.stage} has a start of its own")
    writers = [*ENVS[args.env].writers, "own"]
    if args.demos not in writers:
        fail(f"--demos {args.demos}: {ENVS[args.env].title} has demonstrations by {' or '.join(writers)}")
    command(args, train, f"python rl.py {task_flags(args, args.tokens if args.stage == 'sft' else None)}")


if __name__ == "__main__":
    script(main)
