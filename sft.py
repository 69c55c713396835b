"""sft.py: supervised fine-tuning, and the pretraining of the tiny base it starts from. One loop does both.

    python sft.py --env gp --stage base            # tiny model + tokenizer from scratch, a few minutes -> out/gp/base
    python sft.py --env gp --rule id --stage init  # the short SFT that RL starts from                 -> out/gp/id/init
    python sft.py --env gp --rule id               # SFT continued from init at RL's compute           -> out/gp/id/sft
    python sft.py --env gp --rule id --name own --demos own   # control: the init's own right answers as demonstrations
    python sft.py --env virl --vl --visual id --rule id  # from pictures, by a tiny LLaVA       -> out/virl-vl/id-id/sft
    python sft.py --model Qwen/Qwen2.5-0.5B-Instruct --rule id --lr 1e-6 --micro 4     # a real model, on a GPU
    torchrun --nproc_per_node=2 sft.py --rule id   # several devices
A stage whose input is missing builds it first. A finished run is not trained again (give a new --name for other flags);
--resume continues one that was interrupted (Ctrl-C saves), or a finished one to a larger --tokens.

The loss (paper, section 3): -log pi(answer | prompt), averaged over the answer's tokens and the token that ends the
turn. Prompts carry no loss. Pretraining is the same with every token an "answer", but for the places of pictures.

Compute (paper, appendix): X = 6 N D, for N parameters and D tokens trained on; budgets (--tokens) are X / 6N, so the
same number given to rl.py is the same compute. The init's share is counted, the base's is not.

Metrics, one record a step in metrics.jsonl: loss (nats per answer token; falls, to the noise floor of the
demonstrations), grad_norm (before clipping; near or below 1), lr, tokens_per_s, flops and tokens (cumulative, with the
init's), memory_gb (peak). Records with seen / id / ood hold the monitor's success rates.

Departures from the authors' release: the batch is not 1, one loss denominator per batch, checkpoints are saved whole or
not at all, seeds count. Left out: sequence packing for SFT, LoRA, FSDP (each rank holds the whole model).
"""
import json
import math
import os
import random
import resource
import signal
import time

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, GPT2Tokenizer, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eval import (ENVS, Parser, Segment, all_sum, answer_ids, base_of, brief, chat_text, checkpoint_at, collate, encode,
                  evaluate, fail, found_checkpoints, load, load_state, longest_answer, make, matmul_rate, non_negative,
                  positions, positive, prompt, rollout, same_flags, save, say, script, setup, share,
                  shared_flags, table, task_flags, trained_on, training_flags, wait_for_all, write_json)

STAGES = {  # defaults by stage; each is also a flag. What is None, and more for the base, is the environment's
    #             compute       rows a step  AdamW    Muon: 2-D      steps      last share  monitor     of the eyes
    "base": dict(tokens=None,  batch=None,  lr=3e-3, muon_lr=0.02,  warmup=50, decay=0.4,  monitors=3, vision_rate=1),
    "init": dict(tokens=8.0e4, batch=None,  lr=1e-4, muon_lr=0.0,   warmup=5,  decay=0.0,  monitors=1, vision_rate=1),
    "sft":  dict(tokens=None,  batch=None,  lr=None, muon_lr=0.0,   warmup=5,  decay=0.0,  monitors=6, vision_rate=1),
}


# ----------------------------------------------------------------------------------------------------------------------
# The tiny model: 0.6M parameters, an ordinary Llama or Qwen3 (the environment says which) with a byte-level BPE
# tokenizer trained on the task's phrases; with pictures an ordinary LLaVA of 1.1M around it.

CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}"
                 "{% else %}{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}"
                 "{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def build_tiny(env, seed, vl=False, pixels=80):
    """-> (causal language model with random weights, tokenizer). env.tiny: keywords that set its class apart. Any text
    can be encoded (256 bytes are in the vocabulary); the environment's fixed phrases become a token or two each, as BPE
    may merge across spaces here.

    vl: -> LlavaForConditionalGeneration, the same model behind a CLIP vision tower with patches of pixels / 4, so a
    picture is 16 tokens; tok.processor resizes and normalises pictures with Pillow and NumPy."""
    trainee = GPT2Tokenizer()
    trainee.backend_tokenizer.pre_tokenizer.use_regex = False  # do not split at words before merging
    trained = trainee.train_new_from_iterator(
        [env.fragments(vl)], vocab_size=2000, show_progress=False, min_frequency=1,
        new_special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"] + ["<image>"] * vl)
    tok = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
                                  chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False)
    torch.manual_seed(seed)
    text = AutoConfig.for_model(
        **env.tiny, vocab_size=len(tok), hidden_size=128, intermediate_size=320, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32,
        max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id, bos_token_id=None)
    tok.processor = None
    if vl:
        side = {"height": pixels, "width": pixels}
        tok.processor = LlavaProcessor(
            CLIPImageProcessorPil(size=side, crop_size=side), tok, patch_size=pixels // 4,
            vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=tok.chat_template)
        eyes = CLIPVisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                                image_size=pixels, patch_size=pixels // 4)
        model = LlavaForConditionalGeneration(LlavaConfig(
            vision_config=eyes, text_config=text, vision_feature_layer=-1, vision_feature_select_strategy="default",
            image_token_id=tok.convert_tokens_to_ids("<image>"), tie_word_embeddings=True))
    else:
        model = AutoModelForCausalLM.from_config(text)
    model.generation_config.eos_token_id = [tok.eos_token_id]
    model.generation_config.suppress_tokens = [model.config.image_token_id] if vl else None  # see load()
    return model, tok


# ----------------------------------------------------------------------------------------------------------------------
# Batches. A row is a Segment: ids, and action = 1 on the tokens that carry loss.

def demonstrations(env, seed):
    """The expert plays one episode -> [(messages, images, answer), ...], one a state."""
    messages, images = env.reset(seed)
    states = []
    while messages:
        states.append((messages, images, env.expert()))
        step = env.step(states[-1][-1])
        messages, images = step.messages, step.images
    return states


def demonstration_row(tok, model, messages, images, answer):
    """Prompt without loss, answer and end-of-turn token with it. The prompt's ids are those a rollout would give.

        ids      <user> Make 24 ... <assistant>  {"cards" ... } <end>
        action    0      0  0  0     0            1   1   1  1   1
    """
    row = prompt(tok, messages, images)
    row.add([], 0)
    row.add(answer_ids(tok, model, messages, answer), 1)
    return row


def pretraining_rows(env, tok, rng, count, width=128, chat_share=0.08, picture_share=0.0, pixels=80, rare="ood"):
    """`count` rows of at most `width` tokens, each filled with whole documents; all but a row's first and the places of
    pictures have loss. picture_share: of documents with pictures among all; rare: the look that few of these have."""
    rows, spare, image_id = [], [], tok.convert_tokens_to_ids("<image>") if picture_share else None
    while len(rows) < count:
        ids, pixel_values = [], []
        while True:
            if not spare:
                for _ in range(16 if picture_share else 8 * count):  # pictures beyond the last row are in vain
                    if picture_share and rng.random() < picture_share:
                        doc, images = env.picture_document(rng, chat_share, pixels=pixels, rare=rare)
                    else:
                        doc, images = env.document(rng, chat_share), []
                    text = doc + tok.eos_token if isinstance(doc, str) else chat_text(tok, doc, images)
                    spare.append(encode(tok, text, images))
            if ids and len(ids) + len(spare[-1].ids) > width:
                break
            ids += spare[-1].ids
            pixel_values += spare.pop().pictures.values()
        rows.append(Segment(ids[:width], [int(i > 0 and t != image_id) for i, t in enumerate(ids[:width])]))
        if pixel_values:
            rows[-1].pictures = {"pixel_values": torch.cat(pixel_values)}
    return rows


def own_demonstrations(path, args, run):
    """Rejection sampling: the init plays the training episodes once, its right first answers become the demonstrations
    -> ([the rows of an episode, ...], tokens that went through the model for it). The study's control: same loop, same
    compute, own habit."""
    model, tok = load(path, run.device)
    torch.manual_seed(args.seed)
    envs = [make(args, rule=args.rule, split="train", verify=1) for _ in range(args.own_samples)]
    episodes = rollout(model, tok, envs, [f"own/{args.seed}/{i}" for i in range(len(envs))], 1.0, args.max_new_tokens,
                       run, args.batch_rollout)
    right = [[s for s, turns in zip(e.segments, positions(e)) if turns[0]["position_solved"]] for e in episodes]
    if not any(right):
        fail(f"{path} solves no training episode, so --demos own has nothing to learn from")
    return [rows for rows in right if rows], sum(e.forwarded for e in episodes)


def sft_loss(model, rows, denominator, pad_id, run):
    """Sum of the negative log-likelihoods of the action tokens / denominator -> scalar, fp32."""
    inputs, action = collate(rows, pad_id, run.device)
    with run.amp():
        logits = model(**inputs).logits                                          # [B, T, V]
    keep = action[:, 1:]                                                         # token t is scored by position t-1
    losses = torch.nn.functional.cross_entropy(logits[:, :-1][keep].float(), inputs["input_ids"][:, 1:][keep],
                                               reduction="sum")
    return losses / denominator


# ----------------------------------------------------------------------------------------------------------------------

class Interrupt:
    """Ctrl-C asks the loop to save and stop after the current step; a second one stops at once."""

    def __init__(self):
        self.asked = self.stopped = False
        self.before = signal.signal(signal.SIGINT, self.handle)

    def handle(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        print("\nstopping after this step, then saving; Ctrl-C again stops at once", flush=True)

    def on_any_rank(self, run):  # ranks must leave the loop at the same step, or the rest waits for ever
        self.stopped = all_sum([self.asked], run)[0] > 0
        return self.stopped


def open_log(folder, step, header, resumed):
    """metrics.jsonl of a run, opened for appending. On resume the records after the checkpoint's step are dropped."""
    file, lines = os.path.join(folder, "metrics.jsonl"), []
    try:
        os.makedirs(folder, exist_ok=True)
        if resumed and os.path.isfile(file):
            with open(file) as f:
                whole = [line for line in f if line.endswith("}\n")]  # a killed run may leave half a line
                lines = [line for line in whole if json.loads(line).get("step", 0) <= step]
        with open(file + ".tmp", "w") as f:
            f.writelines(lines or [json.dumps(header) + "\n"])
        os.replace(file + ".tmp", file)
        return open(file, "a", buffering=1)
    except (OSError, ValueError) as e:
        fail(f"cannot write {file}: {e}")


def percent_bar(name, run):
    """A progress bar over the compute budget; silent on other ranks and where there is no terminal."""
    return tqdm(total=100, desc=name, disable=None if run.rank == 0 else True,
                bar_format="{desc} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining} {postfix}")


def reduce_gradients(parameters, run):
    """Sum gradients over the ranks. Losses are already divided by the global token count, so the sum is the mean."""
    if run.world > 1:
        for p in parameters:
            if p.grad is None:  # a rank whose batch had nothing for this parameter still takes part
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)


def fine_tuning_flops(path):
    """Compute already spent on a checkpoint since the base (the init's, for a start); the base's own is not counted."""
    state = load_state(path) if path else {}
    return state.get("flops", 0.0) if state.get("stage") in ("init", "sft", "rl") else 0.0


def check_gradient(norm, optimizers, run, where):
    """No step on a gradient that is not finite. With a loss scaler that is routine: all optimizers skip this step
    (GradScaler alone would skip those that own a bad entry only) and the scale goes down. Without one it is the end."""
    if not math.isfinite(norm):
        if not run.scaler.is_enabled():
            fail(f"the gradient is not finite at {where} (dtype {run.dtype}); the last checkpoint is intact")
        for o in optimizers:
            o.zero_grad(set_to_none=True)


def check_ranks_agree(parameters, run):
    """Stop if the ranks' parameters have drifted apart: they start equal and see the same summed gradients."""
    if run.world > 1:
        low = torch.stack([p.detach().double().sum() for p in parameters])
        high = low.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            fail("the ranks' parameters differ")


def peak_memory_gb(run):
    if run.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def report_speed(name, run, log, model, step, flops, busy, seconds):
    """Print and log FLOP/s over the busy seconds, also as a share of what a bare matrix product reaches right now."""
    rate, peak = flops / busy, matmul_rate(model, run.device) * run.world
    n = sum(p.numel() for p in model.parameters())
    say(run, f"[{name}] {rate / 1e9:.0f} GFLOP/s (6N x {rate / 6 / n:,.0f} tokens/s) = {100 * rate / peak:.0f}% of "
             f"this machine's matrix product ({peak / 1e9:.0f} GFLOP/s); peak memory {peak_memory_gb(run):.1f} GB; "
             f"{seconds:.0f} s")
    if log:
        log.write(json.dumps({"step": step, "flops_per_s": rate, "matmul_flops_per_s": peak,
                              "share_of_matmul": rate / peak, "seconds": seconds}) + "\n")


def train(args, run, source, folder):
    """Train one stage. source: path of the model to start from, None to build the tiny one. folder: the run's place."""
    checkpoint, state, env_class = os.path.join(folder, "checkpoint"), {}, ENVS[args.env]
    demo_env, own = make(args, rule=args.rule, split="train"), None
    if args.resume and checkpoint_at(checkpoint):
        model, tok = load(checkpoint, run.device)
        state = load_state(checkpoint)
        if state.get("stage") != args.stage:
            fail(f"--resume: {checkpoint} was not saved by this stage of sft.py")
    elif source is None:
        model, tok = build_tiny(env_class, args.seed, args.vl, args.pixels)
        model.to(run.device)
    else:
        model, tok = load(source, run.device)
    step, start_flops = state.get("step", 0), state.get("start_flops", fine_tuning_flops(source))
    flops = state.get("flops", start_flops)
    args.max_new_tokens = args.max_new_tokens or longest_answer(tok, model, args)

    # ---- optimizers: Muon for the matrices inside the blocks when the stage asks for it, AdamW for the rest; what sees
    # (vision tower, projector) may learn at other rates than what speaks
    def groups(matrices, lr):
        named = [(name, p) for name, p in model.named_parameters() if matrices == (
            args.muon_lr > 0 and p.ndim == 2 and "embed" not in name and "lm_head" not in name)]
        seeing = [any(word in name for word in ("vision", "visual", "projector", "connector")) for name, _ in named]
        speaking_and_seeing = [([p for (_, p), s in zip(named, seeing) if not s], lr),
                               ([p for (_, p), s in zip(named, seeing) if s], lr * args.vision_rate)]
        return [{"params": params, "lr": rate} for params, rate in speaking_and_seeing if params]
    optimizers = [torch.optim.AdamW(groups(False, args.lr), betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices := groups(True, args.muon_lr):
        optimizers.append(torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.0))
    base_lrs = [[group["lr"] for group in o.param_groups] for o in optimizers]
    for o, saved in zip(optimizers, state.get("optimizers", [])):
        o.load_state_dict(saved)
    if state.get("scaler"):
        run.scaler.load_state_dict(state["scaler"])
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    n = sum(p.numel() for p in parameters)

    if args.demos == "own" and args.stage != "base":
        own, generated = own_demonstrations(source, args, run)
        flops = max(flops, start_flops + 2 * n * generated)  # after a resume they are counted already
        say(run, f"[{args.stage}] {sum(map(len, own))} right answers of the init in {args.own_samples} episodes: these "
                 "are the demonstrations")

    budget, flops_before = 6 * n * args.tokens, flops
    verify = 1 if args.stage == "base" else args.verify or env_class.default_verify
    say(run, f"[{args.stage}] {args.env}, rule {args.rule}: {n / 1e6:.3f}M parameters, {budget:.3g} FLOP on "
             f"{run.device} x {run.world} in {str(run.dtype)[6:]} ({run.why}) -> {folder}")
    log = open_log(folder, step, {"method": "sft", "n": n, **vars(args)}, bool(state)) if run.rank == 0 else None
    bar, interrupt, begun, trained = percent_bar(args.stage, run), Interrupt(), time.perf_counter(), 0.0
    progress, losses, monitor_text = (flops - start_flops) / budget, [], ""
    next_monitor = min(state.get("next_monitor", 0), math.floor(progress * args.monitors) + 1)  # for larger --tokens

    def save_now():
        check_ranks_agree(parameters, run)
        if run.rank == 0:
            save(checkpoint, model, tok, {
                "step": step, "flops": flops, "start_flops": start_flops, "done": progress >= 1, "stage": args.stage,
                "next_monitor": next_monitor, "flags": training_flags(args),
                "optimizers": [o.state_dict() for o in optimizers], "scaler": run.scaler.state_dict()})
        wait_for_all(run)  # the next stage reads what rank 0 has written

    while True:
        # ---- monitor: success on seen / ID / OOD episodes, at equal steps of compute
        if next_monitor <= progress * args.monitors or progress >= 1:
            monitor = evaluate(model, tok, args, run, args.monitor_episodes, verify)
            next_monitor = math.floor(progress * args.monitors) + 1
            monitor_text, recent = brief(monitor), losses[-20:] or [math.nan]
            say(run, f"[{args.stage}] step {step:4d} {100 * min(progress, 1):3.0f}% "
                     f"loss {sum(recent) / len(recent):.3f} {monitor_text} (held-out first answers by the trained "
                     f"rule: {monitor['ood']['other_rule']['p']:.2f}) {time.perf_counter() - begun:.0f} s")
            if log:
                log.write(json.dumps({"step": step, "flops": flops, "tokens": flops / 6 / n, **monitor}) + "\n")
        if interrupt.on_any_rank(run) or progress >= 1 or (args.steps and step >= args.steps):
            break
        started = time.perf_counter()

        # ---- batch: all randomness is a function of (seed, step, rank), so resuming needs no generator state
        rng = random.Random(f"{args.stage}/{args.seed}/{step}/{run.rank}")
        torch.manual_seed(rng.randrange(2 ** 31))
        if args.stage == "base":
            rows = pretraining_rows(env_class, tok, rng, args.batch, args.row_tokens, args.chat_share,
                                    args.picture_share * args.vl, args.pixels, "id" if args.visual == "ood" else "ood")
        elif own:
            rows = [row for episode in rng.sample(own, min(args.batch, len(own))) for row in episode]
        else:
            states = [state for i in range(args.batch)
                      for state in demonstrations(demo_env, f"sft/{args.seed}/{step}/{run.rank}/{i}")]
            rows = [demonstration_row(tok, model, *state) for state in states]
        rows.sort(key=lambda row: len(row.ids))  # rows of like length share a micro-batch

        # ---- learning rate: linear warm-up, then constant, then linear to zero over the last share of the budget
        factor = min(1, (step + 1) / args.warmup) * min(1, (1 - progress) / args.decay if args.decay else 1)
        for o, lrs in zip(optimizers, base_lrs):
            for group, lr in zip(o.param_groups, lrs):
                group["lr"] = lr * factor
            o.zero_grad(set_to_none=True)

        # ---- loss and gradient, one denominator for the whole batch over all micro-batches and ranks
        tokens, positions = all_sum([sum(sum(r.action) for r in rows), sum(len(r.ids) for r in rows)], run)
        model.train()
        loss = 0.0
        for i in range(0, len(rows), args.micro):
            part = sft_loss(model, rows[i:i + args.micro], tokens, tok.pad_token_id, run)
            run.scaler.scale(part).backward()
            loss += part.item()
        loss = all_sum([loss], run)[0]
        if not math.isfinite(loss):
            fail(f"loss is {loss} at step {step} (lr {args.lr:g}, dtype {run.dtype}); the last checkpoint is intact")

        # ---- unscale -> clip -> step
        reduce_gradients(parameters, run)
        for o in optimizers:
            run.scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad).item()
        check_gradient(norm, optimizers, run, f"step {step}")
        for o in optimizers:
            run.scaler.step(o)
        run.scaler.update()
        step += 1
        flops += 6 * n * positions
        trained += time.perf_counter() - started
        losses.append(loss)
        last, progress = progress, (flops - start_flops) / budget
        bar.update(min(100, 100 * progress) - bar.n)
        bar.set_postfix_str(f"loss {loss:.3f} {monitor_text}")
        if log:
            log.write(json.dumps({
                "step": step, "flops": flops, "tokens": flops / 6 / n, "loss": loss, "grad_norm": norm,
                "lr": optimizers[0].param_groups[0]["lr"], "tokens_per_s": positions / (time.perf_counter() - started),
                "memory_gb": peak_memory_gb(run)}) + "\n")
        if math.floor(last * args.saves) < math.floor(progress * args.saves) and progress < 1:
            save_now()
    bar.close()

    signal.signal(signal.SIGINT, interrupt.before)
    save_now()
    if trained:
        report_speed(args.stage, run, log, model, step, flops - flops_before, trained,
                     time.perf_counter() - begun)
    if log:
        log.close()
    if interrupt.stopped:
        say(run, f"stopped at step {step} and saved; go on with --resume")
        raise SystemExit(130)


def flags():
    parser = Parser(__doc__)
    add = shared_flags(parser)
    add("--stage", choices=STAGES, default="sft")                   # base -> init -> sft
    add("--init", metavar="PATH", default=None)                     # start of the sft stage; default: built
    add("--name", default=None)                                     # the run's folder; default: the stage's name
    add("--demos", choices=["expert", "own"], default="expert")     # own: the init's right answers
    add("--own_samples", type=positive(int), default=4096)          # episodes the init plays for --demos own
    add("--chat_share", type=share, default=None)                   # base: documents in the task's chat form
    add("--picture_share", type=share, default=0.5)                 # base with --vl: documents with pictures
    add("--tokens", type=positive(float), default=None)             # compute budget X / 6N, in trained tokens
    add("--steps", type=positive(int), default=None)                # stop after this many steps at the latest
    add("--batch", type=positive(int), default=None)                # episodes (base: rows of documents) a step, rank
    add("--row_tokens", type=positive(int), default=None)           # base: width of a row
    add("--lr", type=positive(float), default=None)                 # AdamW; base and sft: the environment's, STAGES
    add("--muon_lr", type=non_negative, default=None)               # Muon on 2-D weights; 0 = AdamW for all
    add("--vision_rate", type=positive(float), default=None)        # vision tower's and projector's rates, times this
    add("--warmup", type=positive(int), default=None)               # steps of linear warm-up
    add("--decay", type=share, default=None)                 # last share of the budget with lr going to 0
    add("--clip_grad", type=positive(float), default=1.0)           # gradient norm is clipped to this
    add("--monitors", type=positive(int), default=None)             # success rates are measured this often a run
    add("--monitor_episodes", type=positive(int), default=100)      # per column
    add("--saves", type=positive(int), default=4)                   # checkpoints a run
    add("--resume", action="store_true")                            # continue an interrupted run
    return parser


def run_stage(args, run):
    """Train args.stage unless it is there already, building what it starts from first -> its folder."""
    if args.stage == "base" and args.model:
        fail("--stage base trains the tiny model from nothing, --model brings one: with --model, begin at --stage init")
    env = ENVS[args.env]
    of_base, of_sft = (env.base_vl, env.sft_vl) if args.vl else (env.base, env.sft)
    defaults = {**STAGES[args.stage], **(of_base if args.stage == "base" else {})}
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, of_sft[key] if value is None else value)
    if args.stage == "base" and args.vl and args.row_tokens < 32:
        fail(f"--row_tokens {args.row_tokens}: a picture alone takes 16")
    folder = base_of(args) if args.stage == "base" else os.path.join(trained_on(args), args.name or args.stage)
    if checkpoint_at(folder):
        few = args.parent or args.resume or args.stage == "base"
        which = ["model", "seed", "pixels"] + ["data"] * (args.stage != "base")
        same_flags(folder, args, which if few else None)
        if load_state(folder).get("done") and not args.resume:
            say(run, f"[{args.stage}] found, not trained again: {folder}")
            return folder
        if not args.resume and not args.parent:
            fail(f"{folder} holds an unfinished run: continue it with --resume, or choose another --name or --out")
        args.resume = True  # a stage on the way that was interrupted goes on by itself
    source = None
    if args.stage == "init":
        source = args.model or build(args, run, "base")
    elif args.stage == "sft":
        source = args.init or build(args, run, "init")
    train(args, run, source, folder)
    return folder


def build(args, run, stage):
    """Run an earlier stage with its defaults and this run's shared flags -> its folder."""
    sub = flags().parse_args([])
    for key in ("env", "data", "rule", "vl", "visual", "pixels", "model", "out", "seed", "verify", "max_new_tokens",
                "batch_rollout", "device", "dtype", "monitor_episodes", "micro"):
        setattr(sub, key, getattr(args, key))
    sub.stage, sub.parent = stage, True
    if stage == "base":
        sub.max_new_tokens = None
    sub.base_tokens = getattr(args, "base_tokens", None)  # flags of rl.py
    sub.tokens = getattr(args, f"{stage}_tokens", None)
    return run_stage(sub, run)


def main(argv=None):
    args = flags().parse_args(argv)
    args.parent, args.k = False, 1
    run = setup(args)
    folder = run_stage(args, run)
    paths = {name: path for name, path in found_checkpoints(args).items() if name in ("base", "init", "rl")}
    if args.init:
        paths["init"] = args.init
    paths = {"base": folder} if args.stage == "base" else {**paths, args.name or args.stage: folder}
    result = table(paths, args, run)
    if run.rank == 0:
        write_json(os.path.join(folder, "eval.json"), result)
        print(f"next: python rl.py {task_flags(args, 'ppo' if args.stage == 'sft' else None)}")


if __name__ == "__main__":
    script(main)
