"""rl.py: reinforcement learning against the verifier: PPO, token by token, over multi-turn episodes.

    python rl.py --env gp --rule ood      # from an empty folder: base -> short SFT -> PPO -> the ID/OOD table
    python rl.py --env virl --rule id     # the second task; with --vl --visual id either one from pictures
    python rl.py --env gp --rule id --name v1 --verify 1              # one attempt in place of five
    python rl.py --env gp --rule id --name nokl --beta 0              # no KL penalty
    python rl.py --env gp --rule id --name raw --init out/gp/base     # RL without SFT
    python rl.py --model Qwen/Qwen2.5-0.5B-Instruct --out out/qwen    # a model of yours, with its own rates
    torchrun --nproc_per_node=2 rl.py --env gp --rule id              # several devices: FSDP2
What a run is, --name, --resume and Ctrl-C: as in sft.py.

In words: make likelier what earned more than expected. The return R_t is the discounted sum of the rewards
from token t on. The value V(s_t) predicts the return, and the advantage A_t is how much more was earned than
predicted. The verifier says what was right and not what to write, so any right answer will do. SFT wants one
particular text.

The objective. The policy pi is the model, states are token prefixes, actions are tokens. An episode gives
each position (a hand; a place on a route) up to --verify answers, with feedback in between (paper, section
3). One conversation is a Segment. pi_old, V_old: policy and value at sampling; pi_ref: the frozen reference
(the init); eps: the clip. W_t is A_t whitened: whiten().

    ratio     ratio_t = pi(a_t|s_t) / pi_old(a_t|s_t)                                          policy_loss()
    reward    r_t = [verifier / reward_scale if a_t ends an answer] - beta log(pi_old/pi_ref)  token_rewards()
    advantage A_t = delta_t + g_t lambda A_{t+1},   delta_t = r_t + g_t V(s_{t+1}) - V(s_t)    gae()
              g_t = gamma if a_t ends an answer, else 1                                     answer_discounts()
    policy    L_P = mean_t max(-W_t ratio_t, -W_t clip(ratio_t, 1 - eps, 1 + eps))             policy_loss()
    value     L_V = mean_t 1/2 max((V - R_t)^2, (V_clipped - R_t)^2),  R_t = A_t + V_old(s_t)  value_loss()
              V_clipped = V_old + clip(V - V_old, -clip_value, clip_value)
    loss      L_P + coef_value L_V - coef_entropy H(pi)                                        train()

Compute (paper, appendix): X = 6 N (D_init + D_RL) + 2 N D_buffer for N parameters. D_init: the init's tokens.
D_RL: every token of every epoch. D_buffer: every token that went through a model without a gradient: when
policy and reference score, and while sampling, where tokens read from rollout()'s cache do not count again.

Departures from the authors' release: README.md lists them. Left out: vLLM-style sampling, a second network
for V, dropout.
"""
import math
import os
import random
import time
from collections import Counter

import torch

from eval import all_sum, check_model, evaluate, fail, make, rollout, score, script
from sft import (clip_and_step, command, load_checkpoint, load_model, log, micro_batches, open_run,
                 parse_run, restore, run_parser, save_checkpoint, shard)

# Hyper-parameters. A tuple has a column for each task, a number serves all. Some are also flags.
PPO = {                # gp     gp-vl  virl   virl-vl
    "tokens":           (7e5,   8e5,   6e5,   6e5),    # X / 6N after the init, as SFT's
    "batch":            (128,   128,   32,    32),     # episodes an iteration and rank: hands, or routes
    "lr":               (5e-5,  1e-4,  5e-5,  1e-4),   # AdamW, policy; 5e-5 in gp was chosen by ID
    "value_rate":       (10,    10,    100,   100),    # the value head learns at lr times this
    "gamma":            (1.0,   1.0,   0.5,   0.5),    # discount per answer (the paper: 0.9)
    "lam":              0.95,                          # GAE's lambda, per token (the paper: 0.95)
    "beta":             0.02,                          # KL penalty per token (the release: none)
    "clip":             0.2,                           # epsilon (the paper: 0.1)
    "clip_value":       (0.5,   0.5,   5.0,   5.0),    # how far V may move; returns are up to 1, or 2
    "coef_value":       0.1,                           # weight of the value loss (the paper: 0.5)
    "coef_entropy":     0.0,                           # weight of the entropy bonus
    "epochs":           (4,     2,     2,     2),      # passes over each iteration's data (the paper: 4)
    "minibatches":      4,                             # optimizer steps an epoch
    "target_kl":        0.05,                          # epochs end when approx_kl exceeds this
    "decay":            (0.5,   0.5,   0.0,   0.0),    # last share of the budget with lr going to 0
    "evaluations":      2,                             # at equal shares of the budget, one at its start
}
REAL = {"value_rate": 10}  # for a model of yours (--model), besides sft.py's REAL
FLAGS = {  # PPO's hyper-parameters that are flags: type, lowest and highest value, help
    "gamma": (float, 0, 1, "discount per answer; the paper: 0.9"),
    "lam": (float, 0, 1, "GAE's lambda, per token"),
    "beta": (float, 0, 1e9, "weight of the KL penalty per token; 0: none"),
    "clip": (float, 1e-9, 1e9, "how far a ratio may move from 1; the paper: 0.1"),
    "clip_value": (float, 1e-9, 1e9, "how far a value may move from the one at sampling"),
    "coef_value": (float, 0, 1e9, "weight of the value loss; the paper: 0.5"),
    "coef_entropy": (float, 0, 1e9, "weight of the entropy bonus"),
    "epochs": (int, 1, math.inf, "passes over each iteration's data; the paper: 4"),
    "minibatches": (int, 1, math.inf, "optimizer steps an epoch"),
}


# ------------------------------------------------------------------------------------------------------------
# The symbols of the objective. Tensors are 1-D over action tokens in reading order, [n] of a segment, [T] of
# an episode, [N] of several. score() left out prompts, feedback and padding, so there is no mask to forget.

def gae(rewards, values, discounts, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) over the action tokens of ONE episode.

    rewards, values, discounts: [T] floats -> (advantages [T], returns [T]). discounts[t] weighs all that
    comes after token t. The first token of an answer follows the last token of the answer before it.

        rewards 0 0 1, values 0, discounts 1, lam 1   ->   advantages 1 1 1

    Subtracting V, the return expected from s_t, lowers the gradient's variance and not its mean. The verifier
    pays at an answer's end. At lam = 1 every token before it shares that payment (no bias, much variance); at
    lam = 0 a token has only its own reward and the next value.
    When the last attempt is used up we treat the episode as finished: what comes after it is worth 0, and not
    V (we do not bootstrap). This is safe because the model can see in the conversation how many attempts
    remain."""
    advantages, next_value, next_advantage = [], 0.0, 0.0
    for reward, value, discount in zip(*(reversed(x.tolist()) for x in (rewards, values, discounts))):
        delta = reward + discount * next_value - value
        next_advantage = delta + discount * lam * next_advantage
        next_value = value
        advantages.append(next_advantage)
    advantages = torch.tensor(advantages[::-1], dtype=values.dtype, device=values.device)
    return advantages, advantages + values


def whiten(x, machine):
    """Zero mean, unit variance over all action tokens of all ranks. x: [N] -> [N].

    With whitened advantages the weight of the policy loss, compared with the value loss, does not depend on
    the rewards' scale. Returns are not whitened, because V predicts them."""
    # .cpu(): Apple's GPUs know no float64
    total, count = all_sum([x.cpu().double().sum().item(), x.numel()], machine)
    mean = total / count
    variance = all_sum([(x.cpu().double() - mean).square().sum().item()], machine)[0] / count
    return (x - mean) / math.sqrt(variance + 1e-8)


def kl_estimators(logp, ref_logp):
    """Estimates of KL(p || q) per token, from samples of p (Schulman, "Approximating KL", 2020). logp and
    ref_logp: of p and q, [N] -> (k1 [N], k3 [N]). Both have the right mean; only k1 may be negative."""
    k1 = logp - ref_logp
    return k1, torch.expm1(-k1) + k1


def policy_loss(logp, old_logp, advantages, clip):
    """PPO's clipped surrogate objective (Schulman et al. 2017, eq. 7), negated to be a loss. [N] each -> [N].

    Several updates use the same samples, so from the second on the policy differs from the one that sampled
    them. The ratio corrects for the changed probability of each action, but not for the changed distribution
    of states, so it is good only near pi_old: beyond 1 +- clip a token stops pushing further away."""
    ratio = (logp - old_logp).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(values, old_values, returns, clip):
    """Half the squared error of the value, or of the value clipped to within `clip` of the old one: the
    larger one. [N] each -> [N]. Like the clip of the ratio, it keeps one batch from moving V far."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


def token_rewards(segment, reward_scale, beta):
    """Reward of each action token of a segment that has .logp and .ref_logp, [n] each -> [n]. The verifier's
    reward sits on the last token of an answer; every token pays beta times its k1. This penalty keeps the
    policy near the init, which can read both rules; how much that helps here: results/, section losses.

        mask     0 0 1 1 1 0 0 1 1
        reward   0 0 0 0 -1 0 0 0 5    ->   [0 0 -1 0 5] / scale - beta * k1"""
    verifier = torch.tensor([r for r, a in zip(segment.reward, segment.action_mask) if a],
                            device=segment.logp.device)
    return verifier / reward_scale - beta * kl_estimators(segment.logp, segment.ref_logp)[0]


def answer_discounts(segment, gamma):
    """The discount after each action token of a segment -> [n]: gamma where an answer ends, else 1. So gamma
    says how much a later answer counts now, and a long formula is no worse than a short one.

        mask     0 0 1 1 1 0 0 1 1    ->   [1 1 gamma 1 gamma]"""
    mask = segment.action_mask
    return torch.tensor([1.0 if after else gamma for now, after in zip(mask, mask[1:] + [0]) if now])


def split_back(segments, **vectors):
    """Cut each vector over the action tokens of all segments, [N], into a piece for each segment's field."""
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
    split_back(episode.segments, advantage=advantage, returns=returns)


def all_mean(means, machine):
    """{name: a rank's mean} -> {name: the mean over all ranks}."""
    return {name: total / machine.world for name, total in zip(means, all_sum(means.values(), machine))}


def train(args, machine, stop):
    """PPO in the folder args.folder. stop: the Event that a signal sets."""
    # ---- load: a new run's policy, or the newest checkpoint of a resumed one; the reference is the init
    source, state, tensors = load_checkpoint(args, machine)
    policy, tok = load_model(source, args, machine)
    reference, _ = load_model(args.init, args, machine, trained=False)
    # V reads the last hidden state. The head starts at 0, so at first it sends no gradient into the policy.
    value_head = torch.nn.Linear(policy.get_output_embeddings().in_features, 1)
    value_head.load_state_dict(tensors.get("value_head", {"weight": torch.zeros_like(value_head.weight),
                                                          "bias": torch.zeros(1)}))
    shard(value_head, machine, torch.float32)
    optimizer = torch.optim.AdamW(
        [{"params": policy.parameters()}, {"params": value_head.parameters()}],
        lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)  # else 4 bytes a weight more on CUDA
    if tensors:
        restore(optimizer, tensors["optimizer"])
    del tensors  # else the file stays mapped, and on the disk
    parameters = [*policy.parameters(), *value_head.parameters()]
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    envs, pad = [make(args, rule=args.rule, split="train") for _ in range(args.batch)], tok.pad_token_id
    check_model(source, policy, tok, envs[0], args.max_new_tokens, machine)
    n = sum(p.numel() for p in policy.parameters())
    step, flops, start_flops = state["step"], state["flops"], state["start_flops"]
    budget = 6 * n * args.tokens                               # FLOP
    progress = (flops - start_flops) / budget                  # share of the budget that is used up
    before = progress if step else -1                          # one iteration earlier; -1: evaluate the init
    rates, bar = "", open_run(args, machine, n, step)

    while True:
        # ==== EVALUATE, SAVE, STOP. Something is due when int(progress * how often) has changed ====
        ending = progress >= 1 or step >= (args.steps or math.inf)
        stopping = all_sum([stop.is_set()], machine)[0] > 0    # all ranks leave at the same iteration
        if int(progress * args.evaluations) > int(before * args.evaluations) and not ending:
            cells = evaluate(policy, tok, args, machine, args.eval_episodes)
            rates = log(args, machine, {"step": step, "flops": flops, "tokens": flops / 6 / n, **cells},
                        f"[rl] step {step:4d} {100 * progress:3.0f}% ")
        if step > state["step"] and (
                int(progress * args.saves) > int(before * args.saves) or ending or stopping):
            save_checkpoint(args.folder, policy, tok, machine,
                            {"step": step, "flops": flops, "start_flops": start_flops, "world": machine.world,
                             "done": progress >= 1, "scaler": scaler.state_dict()},
                            {"value_head": value_head.state_dict(), "optimizer": optimizer.state_dict()})
        if ending or stopping:
            bar.close()
            return

        # ==== ROLLOUT: an episode in each environment. Randomness: a function of (seed, step, rank) ====
        rng = random.Random(f"rl/{args.seed}/{step}/{machine.rank}")
        torch.manual_seed(rng.randrange(2 ** 31))
        start = time.perf_counter()
        seeds = [f"rl/{args.seed}/{step}/{machine.rank}/{i}" for i in range(args.batch)]
        episodes = rollout(policy, tok, envs, seeds, args.temperature, args.max_new_tokens, machine)
        segments = sorted((s for e in episodes for s in e.segments), key=lambda s: len(s.ids))
        sampling_seconds = time.perf_counter() - start

        # ==== SCORE: log-probs and values of what was said, under the policy and under the reference ====
        # The log-probs are computed again and not taken from generate(), so that they come from the same code
        # as in the update. Dropout stays off in both (rollout() called eval()), or the first ratio is not 1.
        with torch.no_grad():
            for part, _ in micro_batches(segments, args.micro_tokens, machine):
                logp, _, value = score(policy, part, pad, machine, args.temperature, value_head)  # [N], [N]
                ref_logp, _, _ = score(reference, part, pad, machine, args.temperature)           # [N]
                split_back(part, logp=logp, value=value, ref_logp=ref_logp)

        # ==== REWARDS AND ADVANTAGES: per episode, over the action tokens of all its turns ====
        for e in episodes:
            estimate_advantages(e, envs[0].reward_scale, args.beta, args.gamma, args.lam)
        split_back(segments, whitened=whiten(joined(segments, "advantage"), machine))

        # ==== LEARNING RATES: constant, then to zero over the last share of the budget ====
        factor = min(1, (1 - progress) / args.decay) if args.decay else 1
        for group, rate in zip(optimizer.param_groups, (args.lr, args.lr * args.value_rate)):
            group["lr"] = rate * factor
        updates, trained_tokens, stats, ratio_error = 0, 0, Counter(), 0.0

        # ==== UPDATE: a step on each minibatch of each epoch, until the policy is too far from pi_old ====
        minibatches = []  # of all epochs: a fixed number, so that ranks with unequal data stay in step
        for _ in range(args.epochs):
            order = rng.sample(segments, len(segments))
            minibatches += [order[m::args.minibatches] for m in range(args.minibatches)]
        for minibatch in minibatches:
            count = all_sum([sum(len(s.logp) for s in minibatch)], machine)[0]  # action tokens of all ranks
            optimizer.zero_grad(set_to_none=True)
            sums = Counter()
            # weight: 1, or 0 for a micro-batch that a rank repeats to stay in step (torchrun)
            for part, weight in micro_batches(minibatch, args.micro_tokens, machine):
                old_logp = joined(part, "logp")                                                # [N]
                logp, entropy, value = score(policy, part, pad, machine, args.temperature, value_head,
                                             entropy_grad=args.coef_entropy > 0)               # [N] each
                actor = policy_loss(logp, old_logp, joined(part, "whitened"), args.clip)       # [N]
                critic = value_loss(value, joined(part, "value"), joined(part, "returns"),
                                    args.clip_value)                                           # [N]
                loss = (actor + args.coef_value * critic - args.coef_entropy * entropy).sum() / count
                scaler.scale(weight * loss).backward()
                log_ratio = (logp - old_logp).detach()
                if updates == 0:
                    ratio_error = max(ratio_error, log_ratio.abs().max().item())
                for name, x in (("policy_loss", actor), ("value_loss", critic), ("entropy", entropy),
                                ("approx_kl", kl_estimators(old_logp, logp.detach())[1]),
                                ("abs_log_ratio", log_ratio.abs()),
                                ("clip_fraction", ((log_ratio.exp() - 1).abs() > args.clip).float())):
                    sums[name] += weight * x.sum().item()
            trained_tokens += sum(len(s.ids) for s in minibatch)
            means = {name: x / count for name, x in zip(sums, all_sum([*sums.values()], machine))}
            if not all(map(math.isfinite, means.values())):
                fail(f"the loss is not finite at iteration {step} (policy {means['policy_loss']}, value "
                     f"{means['value_loss']}; lr {args.lr:g}, dtype {machine.dtype}); "
                     "the last checkpoint is intact")
            if updates == 0:  # all ratios must be 1; in bf16 single ones are off, but not their mean
                far = ratio_error > 1e-3 if machine.dtype == torch.float32 else means["abs_log_ratio"] > 0.05
                if far:
                    fail(f"|log ratio| before the first step is up to {ratio_error:.1e}, on average "
                         f"{means['abs_log_ratio']:.1e}, in place of 0: score() is not repeatable")
            if means["approx_kl"] > args.target_kl:  # asked before the step, which is not taken then
                break
            norm = clip_and_step(parameters, [optimizer], scaler, f"iteration {step}")
            if math.isfinite(norm):  # else fp16's loss scaler has skipped this step
                updates += 1
                stats.update({**means, "grad_norm": norm})  # a Counter's update() adds

        # ==== LOG: means over this rank, then over all. results/figures.py ppo prints the usual ranges ====
        turns = [t for e in episodes for t in e.turns]
        firsts = [position[0] for e in episodes for position in e.positions()]  # first answers
        read = [t["recognized"] for t in firsts if t.get("recognized") is not None]
        buffer_tokens = sum(e.forwarded for e in episodes) + 2 * sum(len(s.ids) for s in segments)
        k1, k3 = kl_estimators(joined(segments, "logp"), joined(segments, "ref_logp"))
        returns, values = joined(segments, "returns"), joined(segments, "value")
        seconds = time.perf_counter() - start
        record = all_mean({
            "reward": sum(t["reward"] for t in turns) / len(episodes),  # per episode, unscaled; rises
            "success": sum(t["position_solved"] for t in turns) / sum(t["position_done"] for t in turns),
            **({"recognized": sum(read) / max(1, len(read))} if args.vl else {}),  # parts of pictures
            "kl1": k1.sum().item() / len(k1),  # KL(pi_old || pi_ref) a token, by two estimators that should
            "kl3": k3.sum().item() / len(k3),  # agree
            "turns": len(turns) / len(episodes), "tokens_per_answer": len(k1) / len(turns),
            "cut": sum(t["cut"] for t in turns) / len(turns),  # answers that ran into --max_new_tokens
            "explained_var": 1 - ((returns - values).var() / (returns.var() + 1e-8)).item(),  # of R by V
            "ratio_error": ratio_error,  # max |log ratio| before the first step; in fp32 below 4e-5
            # approx_kl and clip_fraction, means over the updates: below .01 and .04; entropy falls slowly
            **{name: x / max(1, updates) for name, x in stats.items()},
            "updates": updates, "lr": args.lr * factor, "sampling_seconds": sampling_seconds,
            "tokens_per_s": machine.world * trained_tokens / seconds,
            "episodes_per_s": machine.world * len(episodes) / seconds,
            "flops": machine.world * (6 * n * trained_tokens + 2 * n * buffer_tokens)}, machine)
        record["verdicts"] = all_mean({v: sum(t["verdict"] == v for t in turns) / len(turns)
                                       for v in envs[0].verdicts}, machine)
        step, flops, before = step + 1, flops + record["flops"], progress
        progress = (flops - start_flops) / budget
        minutes = seconds * max(0, 1 - progress) / (progress - before) / 60
        key = {"reward": ".2f", "success": ".2f", "kl1": ".4f", "clip_fraction": ".3f", "entropy": ".3f",
               "explained_var": ".2f", "episodes_per_s": ".0f"}
        log(args, machine, {**record, "step": step, "flops": flops, "tokens": flops / 6 / n},
            f"KEY {step:3d} " + " ".join(f"{name} {record.get(name, 0):{form}}" for name, form in key.items())
            + f"\n[rl] about {max(0.1, minutes):.1f} minutes to go on this machine" * (step == 2))
        bar.update(min(100, 100 * progress) - bar.n)
        bar.set_postfix_str(f"success {record['success']:.2f} {rates}")
        if machine.rank == 0 and step % 10 == 1:  # a look at what is said
            with open(os.path.join(args.folder, "episodes.txt"), "a", encoding="utf-8") as f:
                for e in episodes[:2]:
                    f.write(f"---- iteration {step}, success {e.turns[-1]['success']}\n"
                            + "\n".join(tok.decode(s.ids) for s in e.segments)
                            + f"\nrewards {[t['reward'] for t in e.turns]}\n")


def main(argv=None):
    parser = run_parser(__doc__, PPO, FLAGS)
    parser.set_defaults(stage="rl")
    args = parse_run(parser, argv, {"rl": PPO}, REAL)
    if args.temperature == 0:
        fail("--temperature 0: PPO needs samples; choose a value above 0")
    if args.minibatches > args.batch:
        fail(f"--minibatches {args.minibatches} is more than --batch {args.batch}: one would be empty")
    command(args, train)


if __name__ == "__main__":
    script(main)
