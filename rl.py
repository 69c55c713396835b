"""rl.py: reinforcement learning against the verifier: PPO, token by token, over multi-turn episodes.

    python rl.py --env gp --rule ood      # from an empty folder: base -> short SFT -> PPO -> the ID/OOD table
    python rl.py --env virl --rule id     # the second task; with --vl --visual id either one from pictures
    python rl.py --env gp --rule id --name v1 --verify 1            # single attempts instead of five
    python rl.py --env gp --rule id --name nokl --beta 0            # no KL penalty
    python rl.py --env gp --rule id --name raw --init out/gp/base   # RL without SFT
    python rl.py --model Qwen/Qwen2.5-0.5B-Instruct --out out/qwen    # a real model, with rates of its own
Finished runs, --name, --resume and Ctrl-C: as in sft.py.

The objective. States are token prefixes, actions tokens. An episode gives each position (a hand; a place on a
route) up to --verify answers, with feedback in between (paper, section 3). pi_old is the policy that sampled,
pi_ref the frozen reference (the init). W_t is A_t whitened: whiten().

    ratio     ratio_t = pi(a_t|s_t) / pi_old(a_t|s_t)                                          policy_loss()
    reward    r_t = [verifier / reward_scale if a_t ends an answer] - beta log(pi_old/pi_ref)  token_rewards()
    advantage A_t = delta_t + g_t lambda A_{t+1},   delta_t = r_t + g_t V(s_{t+1}) - V(s_t)    gae()
              g_t = gamma if a_t ends an answer, else 1                                     answer_discounts()
    policy    L_P = mean_t max(-W_t ratio_t, -W_t clip(ratio_t, 1 - eps, 1 + eps))             policy_loss()
    value     L_V = mean_t 1/2 max((V - R_t)^2, (V_clipped - R_t)^2),  R_t = A_t + V_old(s_t)  value_loss()
              V_clipped = V_old + clip(V - V_old, -clip_value, clip_value)
    loss      L_P + coef_value L_V - coef_entropy H(pi)                                        train()

Why each part is there.
    Gradient    Make likelier what earned more than expected: raise log pi(a_t|s_t) in proportion to A_t. The
                verifier says what was right, not what to write: any right answer will do. SFT wants one text.
    Baseline V  The return expected from s_t. Subtracting it lowers the gradient's variance, not its mean.
    lambda      The verifier pays at an answer's end. At lambda = 1 every token before shares that (no bias,
                much variance). At lambda = 0 a token has r_t and the next value alone.
    gamma       How much a later answer counts now. Within an answer only lambda fades what comes later.
    Whitening   Advantages get mean 0, variance 1, so that L_P keeps its weight beside L_V. Returns do not: V
                predicts them.
    Ratio       Several updates use the same samples. From the second on, pi is no longer what sampled them.
                The ratio corrects a_t for that, not s_t. Before the first it is 1, or the
                run stops (fp32).
    Clip        So the correction is good only near pi_old. Beyond 1 +- eps a token stops pushing further
                away. V_clipped does the same for V.
    Entropy     A bonus for a pi that stays varied. Off by default.
    KL penalty  Keeps pi near the init, which can read both rules. How much it does here: results/, losses.

Metrics, a record an iteration in metrics.jsonl (episodes.txt: two episodes of every tenth iteration), with
medians, unless said, of the runs without pictures at the chosen rates
(`python results/figures.py ppo results/raw/gp-*-rl-1e-4.jsonl results/raw/virl-*-rl-2e-4.jsonl`):
    reward           verifier's reward per episode, unscaled (GeneralPoints: -15 to 5); rises
    success          share of positions solved while sampling; rises
    recognized       with pictures: share of their parts that first answers read right; does not fall
    kl1, kl3         KL(pi_old || pi_ref) per token, two estimators; agree, and grow to .06 (V-IRL: .03)
    approx_kl        KL(pi_old || pi), k3, mean over an iteration's steps; .002, in 95% below .007
    clip_fraction    share of ratios beyond the clip; .007, in 95% below .025: here the clip hardly acts
    ratio_error      max |log ratio| of the first minibatch, before any step (rank 0's); in fp32 below 4e-5
    entropy          nats per token; falls slowly, from .2 to .1 (V-IRL: from .09 to .08), never to 0
    explained_var    1 - Var(R - V) / Var(R), on rank 0; from 0 to .1 in GeneralPoints, where only its last
                     tokens show a formula's worth, to .3 in V-IRL
    value_loss, policy_loss, grad_norm (before clipping), lr (of the policy), updates (optimizer steps taken),
    turns (answers an episode), tokens_per_answer (steady), cut (share of answers that ran into
    --max_new_tokens), verdicts (share of each), tokens_per_s (trained on), episodes_per_s, memory_gb, flops
    (compute X, below), tokens (X / 6N).

Compute (paper, appendix): X = 6 N (D_init + D_RL) + 2 N D_buffer for N parameters. D_RL counts every token of
every epoch, D_buffer every token that went through a model without a gradient: in the scoring passes of
policy and reference, and while sampling (a later turn reads its whole conversation again).

Departures from the authors' release: README.md lists them. After the last attempt the value is 0,
not V: the conversation shows how many were used. Left out: vLLM-style sampling, a second network for V,
dropout.
"""
import math
import os
import random
import time
from collections import Counter
from itertools import chain

import torch

from eval import (ENVS, all_sum, fail, in_step, load, load_state, make, micro_batches, new_parser, parse,
                  place, restore, rollout, say, score, script, task_flags)
from sft import REAL, Loop, clip_and_step, command, fill_in, recompute_activations

# Hyper-parameters. A tuple has a column for each task, a number serves all. Some are also flags: see flags().
PPO = {                # gp     gp-vl  virl   virl-vl
    "tokens":           (8e5,   8e5,   6e5,   6e5),    # X / 6N after the init, as SFT's
    "batch":            (128,   128,   32,    32),     # episodes an iteration and rank: hands, or routes
    "lr":               (1e-4,  1e-4,  2e-4,  1e-4),   # AdamW, policy; without pictures chosen by ID
    "value_rate":       (10,    10,    100,   100),    # the value head learns at lr times this
    "micro_tokens":     2048,                          # tokens a forward pass, padding included
    "gamma":            (1.0,   1.0,   0.5,   0.5),    # discount per answer (the paper: 0.9)
    "lam":              0.95,                          # GAE's lambda, per token (the paper: 0.95)
    "beta":             0.02,                          # KL penalty per token (the release: none)
    "clip":             0.2,                           # epsilon (the paper: 0.1)
    "clip_value":       (0.5,   0.5,   5.0,   5.0),    # how far V may move; returns are up to 1, or 2
    "coef_value":       0.1,                           # weight of the value loss (the paper: 0.5)
    "coef_entropy":     0.0,                           # weight of the entropy bonus
    "epochs":           2,                             # passes over each iteration's data (the paper: 4)
    "minibatches":      4,                             # optimizer steps an epoch
    "target_kl":        0.05,                          # epochs end when approx_kl exceeds this
    "decay":            (0.0,   0.5,   0.0,   0.0),    # last share of budget, lr to 0; for pictured cards
    "monitors":         6,                             # success rates are measured this often a run
}
REAL_PPO = {**REAL, "value_rate": 10}  # what differs for a model from elsewhere


# ------------------------------------------------------------------------------------------------------------
# The symbols of the objective. Tensors are 1-D over action tokens in reading order, [n] of a segment, [T] of
# an episode, [N] of several. score() left out prompts, feedback and padding, so there is no mask to forget.

def gae(rewards, values, discounts, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) over the action tokens of ONE episode.

    rewards, values, discounts: [T] floats -> (advantages [T], returns [T]). discounts[t] weighs all after
    token t. The first token of the next answer follows the last one before it. Nothing follows the end.

        rewards 0 0 1, values 0, discounts 1, lam 1   ->   advantages 1 1 1"""
    advantages, next_value, next_advantage = [], 0.0, 0.0
    for reward, value, discount in zip(*(reversed(x.tolist()) for x in (rewards, values, discounts))):
        delta = reward + discount * next_value - value
        next_advantage = delta + discount * lam * next_advantage
        next_value = value
        advantages.append(next_advantage)
    advantages = torch.tensor(advantages[::-1], dtype=values.dtype, device=values.device)
    return advantages, advantages + values


def whiten(x, run):
    """Zero mean, unit variance over all action tokens of all ranks. x: [N] -> [N]."""
    total, count = all_sum([x.cpu().double().sum().item(), x.numel()], run)  # Apple's GPUs know no float64
    mean = total / count
    variance = all_sum([(x.cpu().double() - mean).square().sum().item()], run)[0] / count
    return (x - mean) / math.sqrt(variance + 1e-8)


def kl_estimators(logp, ref_logp):
    """Estimates of KL(p || q) per token, from samples of p (Schulman, "Approximating KL", 2020). logp and
    ref_logp: of p and q, [N] -> (k1 [N], k3 [N]). Both have the right mean; only k1 may be negative."""
    k1 = logp - ref_logp
    return k1, torch.expm1(-k1) + k1


def policy_loss(logp, old_logp, advantages, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated. [N] each -> [N]."""
    ratio = (logp - old_logp).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(values, old_values, returns, clip):
    """Squared error of the value and of the value clipped near the old one: the worse. [N] each -> [N]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


def token_rewards(segment, reward_scale, beta):
    """Reward of each action token of a segment that has .logp and .ref_logp, [n] each -> [n]. The verifier's
    reward sits on the last token of an answer; every token pays beta times its k1.

        mask     0 0 1 1 1 0 0 1 1
        reward   0 0 0 0 -1 0 0 0 5    ->   [0 0 -1 0 5] / scale - beta * k1"""
    verifier = torch.tensor([r for r, a in zip(segment.reward, segment.action_mask) if a],
                            device=segment.logp.device)
    return verifier / reward_scale - beta * kl_estimators(segment.logp, segment.ref_logp)[0]


def answer_discounts(segment, gamma):
    """The discount behind each action token of a segment -> [n]: gamma where an answer ends, else 1.

        mask     0 0 1 1 1 0 0 1 1    ->   [1 1 gamma 1 gamma]"""
    mask = segment.action_mask
    return torch.tensor([1.0 if after else gamma for now, after in zip(mask, mask[1:] + [0]) if now])


def hand_out(segments, **vectors):
    """Cut vectors over the action tokens of all segments, [N], into a piece for each, kept in its field."""
    counts = [sum(s.action_mask) for s in segments]
    for name, vector in vectors.items():
        for s, piece in zip(segments, vector.split(counts)):
            setattr(s, name, piece)


def joined(segments, name):
    """A field of all segments as one vector, [N]."""
    return torch.cat([getattr(s, name) for s in segments])


def estimate_advantages(episode, reward_scale, beta, gamma, lam):
    """Give each segment of one episode .advantage and .returns from .reward, .logp, .ref_logp and .value."""
    rewards = torch.cat([token_rewards(s, reward_scale, beta) for s in episode.segments])   # [T]
    discounts = torch.cat([answer_discounts(s, gamma) for s in episode.segments])           # [T]
    advantage, returns = gae(rewards, joined(episode.segments, "value"), discounts, lam)    # [T], [T]
    hand_out(episode.segments, advantage=advantage, returns=returns)


def train(args, run, init, folder):
    """The training loop. init: the checkpoint that is both start and frozen reference. folder: the run's."""
    checkpoint, env_class = os.path.join(folder, "checkpoint"), ENVS[args.env]
    state = load_state(checkpoint, whole=True) if args.resume else {}  # {} too if nothing is saved there
    model, tok = load(checkpoint if state else init)
    if args.activation_checkpointing:
        recompute_activations(model)
    # V reads the last hidden state. Its head starts at 0: no value gradient in the trunk before it learns.
    value_head = torch.nn.Linear(model.get_output_embeddings().in_features, 1)
    torch.nn.init.zeros_(value_head.weight)
    torch.nn.init.zeros_(value_head.bias)
    if state:
        value_head.load_state_dict(state["value_head"])
    for module, dtype in (model, run.dtype), (value_head, torch.float32):
        place(module, run, dtype, args.shard)
    reference = load(init, dtype=run.weights)[0].requires_grad_(False)
    place(reference, run, run.dtype, args.shard)
    parameters = [*model.parameters(), *value_head.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "rate": args.lr},
         {"params": value_head.parameters(), "rate": args.lr * args.value_rate}],
        lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)  # else 4 bytes a weight more on CUDA
    if state:
        restore(optimizer, state["optimizer"])
    del state  # the optimizer holds its tensors
    envs, pad = [make(args, rule=args.rule, split="train") for _ in range(args.batch)], tok.pad_token_id
    loop = Loop(args, run, folder, init, model, tok,
                lambda: {"value_head": value_head.state_dict(), "optimizer": optimizer.state_dict()})

    while loop.goes_on():
        # ==== ROLLOUT: an episode in each environment. Randomness: a function of (seed, iteration, rank) ====
        rng = random.Random(f"rl/{args.seed}/{loop.step}/{run.rank}")
        torch.manual_seed(rng.randrange(2 ** 31))
        start = time.perf_counter()
        seeds = [f"rl/{args.seed}/{loop.step}/{run.rank}/{i}" for i in range(args.batch)]
        episodes = rollout(model, tok, envs, seeds, args.temperature, args.max_new_tokens, run)
        segments = sorted((s for e in episodes for s in e.segments), key=lambda s: len(s.ids))
        sampling_seconds = time.perf_counter() - start

        # ==== SCORE: log-probs and values of what was said, under the policy and under the reference ====
        # The policy is scored anew rather than read off generate(), so that update and score use one code
        # path. Dropout stays off in both (rollout() called eval()): with it, the first ratio would not be 1.
        with torch.no_grad():
            for part, _ in in_step(micro_batches(segments, args.micro_tokens), run):
                logp, _, value = score(model, part, pad, run, args.temperature, value_head)  # [N], [N]
                ref_logp, _, _ = score(reference, part, pad, run, args.temperature)          # [N]
                hand_out(part, logp=logp, value=value, ref_logp=ref_logp)

        # ==== REWARDS AND ADVANTAGES: per episode, over the action tokens of all its turns ====
        for e in episodes:
            estimate_advantages(e, env_class.reward_scale, args.beta, args.gamma, args.lam)
        hand_out(segments, whitened=whiten(joined(segments, "advantage"), run))

        # ==== UPDATE: at constant rates, but for the last share of the budget, in which they go to zero ====
        factor = min(1, (1 - loop.progress) / args.decay) if args.decay else 1
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        updates, trained_tokens, stats, ratio_error = 0, 0, Counter(), 0.0
        model.train(args.activation_checkpointing)  # recomputing needs train() mode, without dropout then
        minibatches = []  # of all epochs: a fixed number, so that ranks with unequal data stay in step
        for _ in range(args.epochs):
            order = rng.sample(segments, len(segments))
            minibatches += [order[m::args.minibatches] for m in range(args.minibatches)]
        for minibatch in minibatches:
            count = all_sum([sum(len(s.logp) for s in minibatch)], run)[0]  # over all micro-batches and ranks
            optimizer.zero_grad(set_to_none=True)
            sums = Counter()
            # weight: 1, or 0 for a micro-batch that a rank repeats to stay in step (--shard)
            for part, weight in in_step(micro_batches(minibatch, args.micro_tokens), run):
                old_logp = joined(part, "logp")                                                # [N]
                logp, entropy, value = score(model, part, pad, run, args.temperature, value_head,
                                             entropy_grad=args.coef_entropy > 0)               # [N] each
                policy = policy_loss(logp, old_logp, joined(part, "whitened"), args.clip)      # [N]
                critic = value_loss(value, joined(part, "value"), joined(part, "returns"),
                                    args.clip_value)                                           # [N]
                loss = (policy + args.coef_value * critic - args.coef_entropy * entropy).sum() / count
                run.scaler.scale(weight * loss).backward()
                log_ratio = (logp - old_logp).detach()
                if updates == 0:
                    ratio_error = max(ratio_error, log_ratio.abs().max().item())
                for name, x in (("policy_loss", policy), ("value_loss", critic), ("entropy", entropy),
                                ("approx_kl", kl_estimators(old_logp, logp.detach())[1]),
                                ("clip_fraction", ((log_ratio.exp() - 1).abs() > args.clip).float())):
                    sums[name] += weight * x.sum().item()
            trained_tokens += sum(len(s.ids) for s in minibatch)
            means = {name: x / count for name, x in zip(sums, all_sum(list(sums.values()), run))}
            if not all(map(math.isfinite, means.values())):
                fail(f"the loss is not finite at iteration {loop.step} (policy {means['policy_loss']}, value "
                     f"{means['value_loss']}; lr {args.lr:g}, dtype {run.dtype}); "
                     "the last checkpoint is intact")
            if run.dtype == torch.float32 and ratio_error > 1e-3:
                fail(f"max |log ratio| is {ratio_error:.1e} before the first step: score() is not repeatable")
            if means["approx_kl"] > args.target_kl:  # asked before the step: it is not taken then
                break
            norm = clip_and_step(parameters, [optimizer], run, f"iteration {loop.step}")
            if math.isfinite(norm):  # else fp16's loss scaler has skipped this step
                updates += 1
                stats.update({**means, "grad_norm": norm})  # a Counter's update() adds

        # ==== COMPUTE AND LOG: sums over all ranks, then shares and means (explained_var: rank 0's) ====
        turns = [t for e in episodes for t in e.turns]
        read = [t["recognized"] for e in episodes for t, *_ in e.positions()
                if t.get("recognized") is not None]
        k1, k3 = kl_estimators(joined(segments, "logp"), joined(segments, "ref_logp"))
        returns, values = joined(segments, "returns"), joined(segments, "value")
        fractions = {  # of this rank: (numerator, denominator)
            "reward": (sum(t["reward"] for t in turns), len(episodes)),
            "success": (sum(t["position_solved"] for t in turns), sum(t["position_done"] for t in turns)),
            **({"recognized": (sum(read), len(read))} if args.vl else {}),
            "kl1": (k1.sum().item(), len(k1)), "kl3": (k3.sum().item(), len(k3)),
            "turns": (len(turns), len(episodes)), "tokens_per_answer": (len(k1), len(turns)),
            "cut": (sum(t["cut"] for t in turns), len(turns)),
            **{v: (sum(t["verdict"] == v for t in turns), len(turns)) for v in env_class.verdicts}}
        buffer_tokens = sum(e.forwarded for e in episodes) + 2 * sum(len(s.ids) for s in segments)
        played, trained, buffer, *sums = all_sum(
            [len(episodes), trained_tokens, buffer_tokens, *chain(*fractions.values())], run)
        record = {name: x / max(1, n) for name, x, n in zip(fractions, sums[::2], sums[1::2])}
        record.update({
            "verdicts": {v: record.pop(v) for v in env_class.verdicts},
            **{name: x / max(1, updates) for name, x in stats.items()},
            "ratio_error": ratio_error, "updates": updates, "lr": args.lr * factor,
            "explained_var": 1 - ((returns - values).var() / (returns.var() + 1e-8)).item(),
            "episodes_per_s": played / (time.perf_counter() - start), "sampling_seconds": sampling_seconds})
        key = {"reward": ".2f", "success": ".2f", "kl1": ".4f", "clip_fraction": ".3f", "entropy": ".3f",
               "explained_var": ".2f", "episodes_per_s": ".0f"}
        say(run, f"KEY {loop.step + 1:3d}", *(f"{n} {record.get(n, 0):{form}}" for n, form in key.items()))
        if run.rank == 0 and loop.step % 10 == 0:
            with open(os.path.join(folder, "episodes.txt"), "a" if loop.step else "w", encoding="utf-8") as f:
                for e in episodes[:2]:
                    f.write(f"---- iteration {loop.step + 1}, success {e.turns[-1]['success']}\n"
                            + "\n".join(tok.decode(s.ids) for s in e.segments)
                            + f"\nrewards {[t['reward'] for t in e.turns]}\n")
        loop.step_done(6 * loop.n * trained + 2 * loop.n * buffer, trained, record,
                       f"success {record['success']:.2f}")
    loop.close()


def flags():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--init", metavar="PATH")                # policy and reference; default: built if missing
    add("--name", default="rl")                  # the run's folder: out/ENV/RULE/NAME
    add("--steps", type=int)                     # stop after this many iterations at the latest
    add("--resume", action="store_true")         # continue an interrupted run from its checkpoint
    for name in ("tokens", "lr", "gamma", "lam", "beta", "clip", "coef_value", "coef_entropy"):
        add(f"--{name}", type=float)             # explained in the table PPO above; so are the next four
    for name in ("batch", "epochs", "minibatches", "monitors"):
        add(f"--{name}", type=int)
    add("--shard", action="store_true")          # spread weights, gradient, optimizer over torchrun's ranks
    add("--activation_checkpointing", action="store_true")  # less memory for activations, a third more time
    return parser


def main(argv=None):
    args = parse(flags(), argv)
    if args.temperature == 0:
        fail("--temperature 0: PPO needs samples; choose a value above 0")
    # --tokens as given: below it gets this script's default.
    following = f"python sft.py {task_flags(args, args.tokens)}    # SFT at the same compute"
    args.stage = "rl"
    fill_in(args, {**PPO, **REAL_PPO} if args.from_elsewhere else PPO)
    if args.minibatches > args.batch:
        fail(f"--minibatches {args.minibatches} is more than --batch {args.batch}: a minibatch would be "
             "empty")
    command(args, train, following)


if __name__ == "__main__":
    script(main)
