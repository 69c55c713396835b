"""rl.py: reinforcement learning against the verifier. PPO, token by token, over multi-turn episodes, in one loop.

    python rl.py --env gp --rule ood                # from an empty folder: base -> short SFT -> PPO -> the ID/OOD table
    python rl.py --env virl --rule id               # the second task; with --vl --visual id either one from pictures
    python rl.py --env gp --rule id --name v1 --verify 1            # single attempts instead of five
    python rl.py --env gp --rule id --name nokl --beta 0            # no KL penalty
    python rl.py --env gp --rule id --name raw --init out/gp/base   # RL without SFT
    python rl.py --init Qwen/Qwen2.5-0.5B-Instruct --lr 1e-6 --lr_value 1e-5 --batch 64 --micro 4  # on a GPU
    torchrun --nproc_per_node=2 rl.py --rule ood    # several devices
A finished run is not trained again (give a new --name for other flags). --resume continues an interrupted run, or a
finished one to a larger --tokens; Ctrl-C saves.

The objective. States are token prefixes, actions tokens; an episode is up to `--verify` answers with the verifier's
feedback in between (paper, section 3, "sequential revision"). With the policy pi, the policy that sampled pi_old, the
frozen reference pi_ref (the init) and ratio_t = pi(a_t|s_t) / pi_old(a_t|s_t):

    reward     r_t = [verifier's reward / reward_scale, if a_t ends an answer] - beta log(pi_old / pi_ref)(a_t|s_t)
    advantage  A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = r_t + gamma V(s_{t+1}) - V(s_t)    -> gae()
    policy     L_P = mean_t max(-A_t ratio_t, -A_t clip(ratio_t, 1 - eps, 1 + eps))                     -> policy_loss()
    value      L_V = mean_t 1/2 max((V - R)^2, (V_clipped - R)^2),   R_t = A_t + V_old(s_t)             -> value_loss()
    loss       L_P + coef_value L_V - coef_entropy H(pi)

Metrics, one record an iteration in metrics.jsonl, and what is healthy:
    reward            verifier's reward per episode, unscaled, in GeneralPoints in [-15, 5]; rises
    success           share of positions (hands; steps of a route) solved while sampling; rises
    recognized        with pictures: share of their parts that first answers read right; rises, or does not fall
    kl1, kl3          KL(pi || pi_ref) per token, two estimators (below); grows slowly, stays under ~0.3; they agree
    approx_kl         KL(pi_old || pi) over the update, k3; 0.001-0.02; epochs end early above --target_kl
    clip_fraction     share of ratios beyond the clip; 0.01-0.2; 0 for the first minibatch
    ratio_error       max |log ratio| of the first minibatch, before any step: rounding only. In fp32 below 1e-5, or
                      1e-4 for a very sharp policy; above 1e-3 the run stops
    entropy           nats per token; falls slowly, never to 0
    explained_var     1 - Var(R - V) / Var(R), on rank 0; from 0 towards 1
    value_loss, policy_loss, grad_norm (before clipping), lr (of the policy)
    tokens_per_answer steady; cut: share of answers that ran into --max_new_tokens; near 0
    verdicts          share of each verdict among all answers
    tokens_per_s      tokens trained on (all epochs) per second of the whole iteration; episodes_per_s likewise;
                      seconds: of the iteration, sampling_seconds: of its rollout alone
    flops, tokens     cumulative compute, below, and the same / 6N; memory_gb: peak

Compute (paper, appendix): X = 6 N (D_init + D_RL) + 2 N D_buffer for N parameters. D_RL counts every token of every
epoch, D_buffer every token that went through a model without a gradient: prompts and answers while sampling (a later
turn reads its whole conversation again), and the scoring passes of policy and reference.

Departures from the authors' release: a KL penalty; a ratio per token, not per turn; GAE that stops at the episode's end
(running out of attempts is an end, not a truncation: the count of attempts stands in the conversation); gamma
near 1, because the paper's 0.9 per turn would be 0.9 per token here; batches; seeds; checkpoints. Left out: vLLM-style
sampling, FSDP (each rank holds policy, reference and optimizer), a value network of its own, dropout during updates.
"""
import json
import math
import os
import random
import signal
import time
from collections import Counter
from types import SimpleNamespace

import torch

import sft
from eval import (ENVS, Parser, all_sum, brief, checkpoint_at, evaluate, fail, found_checkpoints, load, load_state,
                  longest_answer, make, non_negative, positions, positive, rollout, same_flags, save, say, score,
                  script, setup, share, shared_flags, table, task_flags, trained_on, training_flags, wait_for_all,
                  write_json)


# ----------------------------------------------------------------------------------------------------------------------
# The symbols of the objective. All tensors are 1-D over action tokens, in reading order; prompts, feedback and padding
# were left out by score(), so there is no mask to forget.

def gae(rewards, values, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) over the action tokens of ONE episode.

    rewards, values: [T] floats -> (advantages [T], returns [T]). Turns and conversations of the episode are joined: the
    next action after the last token of a failed answer is the first token of the next answer. Nothing follows the end.

        rewards 0 0 1, values 0, gamma = lam = 1   ->   advantages 1 1 1
    """
    advantages, next_value, carry = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist())):
        delta = reward + gamma * next_value - value
        carry = delta + gamma * lam * carry
        advantages.append(carry)
        next_value = value
    advantages = torch.tensor(advantages[::-1], dtype=values.dtype, device=values.device)
    return advantages, advantages + values


def whiten(x, run):
    """Zero mean, unit variance over all action tokens of all ranks. x: [N] -> [N]."""
    total, count = all_sum([x.cpu().double().sum().item(), x.numel()], run)  # Apple's GPUs know no float64
    mean = total / count
    variance = all_sum([(x.cpu().double() - mean).square().sum().item()], run)[0] / count
    return (x - mean) / math.sqrt(variance + 1e-8)


def kl_estimators(logp, ref_logp):
    """Per-token estimates of KL(pi || pi_ref) from samples of pi (Schulman, "Approximating KL divergence", 2020).

    logp, ref_logp: [N] -> (k1 [N], k3 [N]). Both have the right mean; k1 = log(pi/ref) may be negative, k3 may not."""
    k1 = logp - ref_logp
    return k1, torch.expm1(-k1) + k1


def policy_loss(logp, old_logp, advantages, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated. [N] each -> [N]."""
    ratio = (logp - old_logp).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(values, old_values, returns, clip):
    """Squared error, with the step away from the old value clipped and the worse of the two taken. [N] each -> [N]."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


def token_rewards(segment, reward_scale, beta):
    """Reward of each action token of a segment that carries .logp and .ref_logp, [n] each -> [n].

    The verifier's reward sits on the last token of an answer; every token pays beta times its k1.

        action   0 0 1 1 1 0 0 1 1
        reward   0 0 0 0 -1 0 0 0 5    ->   [0 0 -1 0 5] / scale - beta * k1
    """
    verifier = torch.tensor([r for r, a in zip(segment.reward, segment.action) if a], device=segment.logp.device)
    return verifier / reward_scale - beta * kl_estimators(segment.logp, segment.ref_logp)[0]


def hand_out(segments, **vectors):
    """Cut vectors over the action tokens of all segments, [N], into one piece a segment, kept as its attributes."""
    counts = [sum(s.action) for s in segments]
    for name, vector in vectors.items():
        for s, piece in zip(segments, vector.split(counts)):
            setattr(s, name, piece)


def estimate_advantages(episode, reward_scale, beta, gamma, lam):
    """Give each segment of one episode its .advantage and .returns, [n] each, from .logp, .ref_logp and .value."""
    rewards = torch.cat([token_rewards(s, reward_scale, beta) for s in episode.segments])   # [T]
    values = torch.cat([s.value for s in episode.segments])                                 # [T]
    advantage, returns = gae(rewards, values, gamma, lam)                                   # [T], [T]
    hand_out(episode.segments, advantage=advantage, returns=returns)


# ----------------------------------------------------------------------------------------------------------------------

def train(args, run, init, folder):
    """The training loop. init: path of the checkpoint that is start and frozen reference. folder: the run's place."""
    checkpoint, state, env_class = os.path.join(folder, "checkpoint"), {}, ENVS[args.env]
    resumed = args.resume and checkpoint_at(checkpoint)
    model, tok = load(checkpoint if resumed else init, run.device)
    reference = load(init, run.device)[0].requires_grad_(False)
    # The value head reads the policy's last hidden state. It starts at V = 0, so that the trunk feels no value gradient
    # before the head has learnt something.
    value_head = torch.nn.Linear(model.config.get_text_config().hidden_size, 1, device=run.device)
    torch.nn.init.zeros_(value_head.weight)
    torch.nn.init.zeros_(value_head.bias)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": args.lr},
                                   {"params": list(value_head.parameters()), "lr": args.lr_value}],
                                  betas=(0.9, 0.95), weight_decay=0.0)
    if resumed:
        state = load_state(checkpoint)
        if "value_head" not in state:
            fail(f"--resume: {checkpoint} was not saved by rl.py")
        value_head.load_state_dict(state["value_head"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    n = sum(p.numel() for p in model.parameters())
    start_flops = sft.fine_tuning_flops(init)
    iteration, flops = state.get("iteration", 0), state.get("flops", start_flops)
    budget, progress = 6 * n * args.tokens, (flops - start_flops) / (6 * n * args.tokens)

    verify = args.verify or env_class.default_verify
    args.max_new_tokens = args.max_new_tokens or longest_answer(tok, model, args)
    envs = [make(args, rule=args.rule, split="train", verify=verify) for _ in range(args.batch)]
    pad = tok.pad_token_id

    say(run, f"[rl] {args.env}, rule {args.rule}, up to {verify} attempts: {n / 1e6:.3f}M parameters, {budget:.3g} "
             f"FLOP on {run.device} x {run.world} in {str(run.dtype)[6:]} ({run.why}) -> {folder}")
    log = sft.open_log(folder, iteration, {"method": "rl", "n": n, **vars(args)}, resumed) if run.rank == 0 else None
    bar = sft.percent_bar("rl", run)
    next_monitor = min(state.get("next_monitor", 0), math.floor(progress * args.monitors) + 1)  # for larger --tokens
    monitor_text, interrupt, begun, busy = "", sft.Interrupt(), time.perf_counter(), 0.0

    def save_now():
        sft.check_ranks_agree(parameters, run)
        if run.rank == 0:
            save(checkpoint, model, tok, {
                "iteration": iteration, "flops": flops, "done": progress >= 1, "stage": "rl",
                "next_monitor": next_monitor, "flags": training_flags(args),
                "value_head": value_head.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": run.scaler.state_dict()})
        wait_for_all(run)

    while True:
        # ==== MONITOR: success on seen / ID / OOD episodes, at equal steps of compute ====
        if next_monitor <= progress * args.monitors or progress >= 1:
            monitor = evaluate(model, tok, args, run, args.monitor_episodes, verify)
            next_monitor = math.floor(progress * args.monitors) + 1
            monitor_text = brief(monitor)
            say(run, f"[rl] iteration {iteration:3d} {100 * min(1, progress):3.0f}% {monitor_text} (held-out first "
                     f"answers by the trained rule: {monitor['ood']['other_rule']['p']:.2f}) "
                     f"{time.perf_counter() - begun:.0f} s")
            if log:
                log.write(json.dumps({"step": iteration, "flops": flops, "tokens": flops / 6 / n, **monitor}) + "\n")
        if interrupt.on_any_rank(run) or progress >= 1 or (args.steps and iteration >= args.steps):
            break
        started = time.perf_counter()

        # ==== ROLLOUT: play one episode in every environment. Randomness is a function of (seed, iteration, rank) ====
        rng = random.Random(f"rl/{args.seed}/{iteration}/{run.rank}")
        torch.manual_seed(rng.randrange(2 ** 31))
        episodes = rollout(model, tok, envs, [f"rl/{args.seed}/{iteration}/{run.rank}/{i}" for i in range(args.batch)],
                           args.temperature, args.max_new_tokens, run, args.batch_rollout)
        segments = sorted((s for e in episodes for s in e.segments), key=lambda s: len(s.ids))
        sampling_seconds = time.perf_counter() - started

        # ==== SCORE: log-probs and values of what was said, under the policy and under the reference ====
        # The policy is scored anew rather than read off generate(), so that update and score use one code path. Dropout
        # stays off in both (rollout() called eval()): with it, the first ratio would not be 1.
        with torch.no_grad():
            for i in range(0, len(segments), args.micro):
                part = segments[i:i + args.micro]
                logp, _, value = score(model, part, pad, run, args.temperature, value_head)      # [N], [N]
                ref_logp, _, _ = score(reference, part, pad, run, args.temperature)              # [N]
                hand_out(part, logp=logp, value=value, ref_logp=ref_logp)

        # ==== REWARDS AND ADVANTAGES: per episode, over the action tokens of all its turns ====
        for e in episodes:
            estimate_advantages(e, env_class.reward_scale, args.beta, args.gamma, args.lam)
        hand_out(segments, advantage=whiten(torch.cat([s.advantage for s in segments]), run))

        # ==== UPDATE: at constant rates, but for the last share of the budget, in which they go to zero ====
        factor = min(1, (1 - progress) / args.decay) if args.decay else 1
        for group, lr in zip(optimizer.param_groups, (args.lr, args.lr_value)):
            group["lr"] = lr * factor
        updates, trained_tokens, stats, ratio_error = 0, 0, Counter(), 0.0
        for epoch in range(args.epochs):
            order = rng.sample(segments, len(segments))
            for m in range(args.minibatches):  # a fixed number, so that ranks with unequal data stay in step
                batch = sorted(order[m::args.minibatches], key=lambda s: len(s.ids))
                count = all_sum([sum(len(s.logp) for s in batch)], run)[0]  # one denominator: micro-batches and ranks
                optimizer.zero_grad(set_to_none=True)
                sums, widest = [0.0] * 5, 0.0
                for i in range(0, len(batch), args.micro):
                    part = batch[i:i + args.micro]
                    old_logp = torch.cat([s.logp for s in part])                                 # [N]
                    advantage = torch.cat([s.advantage for s in part])                           # [N]
                    logp, entropy, value = score(model, part, pad, run, args.temperature, value_head)
                    policy = policy_loss(logp, old_logp, advantage, args.clip)                   # [N]
                    critic = value_loss(value, torch.cat([s.value for s in part]), torch.cat([s.returns for s in part]),
                                        args.clip_value)                                         # [N]
                    loss = (policy + args.coef_value * critic - args.coef_entropy * entropy).sum() / count
                    run.scaler.scale(loss).backward()
                    log_ratio = (logp - old_logp).detach()
                    widest = max(widest, log_ratio.abs().max().item())
                    approx_kl = kl_estimators(old_logp, logp.detach())[1]
                    clipped = ((log_ratio.exp() - 1).abs() > args.clip).float()
                    sums = [a + x.sum().item() for a, x in zip(sums, (policy, critic, entropy, approx_kl, clipped))]
                sums = [x / count for x in all_sum(sums, run)]
                if not all(map(math.isfinite, sums)):
                    fail(f"the loss is not finite at iteration {iteration} (policy {sums[0]}, value {sums[1]}; "
                         f"lr {args.lr:g}, dtype {run.dtype}); the last checkpoint is intact")
                if updates == 0:
                    ratio_error = widest
                    if run.dtype == torch.float32 and ratio_error > 1e-3:
                        fail(f"max |log ratio| is {ratio_error:.1e} before the first step: score() is not repeatable")
                trained_tokens += sum(len(s.ids) for s in batch)
                stopped = sums[3] > args.target_kl  # before the step: the one that would go too far is not taken
                if stopped:
                    break
                sft.reduce_gradients(parameters, run)
                run.scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad).item()
                sft.check_gradient(norm, [optimizer], run, f"iteration {iteration}")
                run.scaler.step(optimizer)
                run.scaler.update()
                updates += 1
                for name, value in zip(("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction",
                                        "grad_norm"), (*sums, norm)):
                    stats[name] += value
            if stopped:
                break
        iteration += 1

        # ==== COMPUTE AND LOG: sums over all ranks, then shares and means (explained_var: rank 0's) ====
        turns = [t for e in episodes for t in e.turns]
        k1, k3 = kl_estimators(torch.cat([s.logp for s in segments]), torch.cat([s.ref_logp for s in segments]))
        returns, values = (torch.cat([getattr(s, name) for s in segments]) for name in ("returns", "value"))
        read = [turn[0].get("recognized") for e in episodes for turn in positions(e)]
        read = [x for x in read if x is not None]
        parts = {"trained": trained_tokens,
                 "buffer": sum(e.forwarded for e in episodes) + 2 * sum(len(s.ids) for s in segments),
                 "episodes": len(episodes), "solved": sum(t["position_solved"] for t in turns),
                 "positions": sum(t["position_done"] for t in turns),
                 "recognized": sum(read), "read": len(read),
                 "turns": len(turns), "reward": sum(t["reward"] for t in turns), "cut": sum(t["cut"] for t in turns),
                 "actions": len(k1), "k1": k1.sum().item(), "k3": k3.sum().item(),
                 **{v: sum(t["verdict"] == v for t in turns) for v in env_class.verdicts}}
        total = SimpleNamespace(**dict(zip(parts, all_sum(list(parts.values()), run))))
        flops += 6 * n * total.trained + 2 * n * total.buffer
        last, progress = progress, (flops - start_flops) / budget
        seconds = time.perf_counter() - started
        busy += seconds
        record = {"step": iteration, "flops": flops, "tokens": flops / 6 / n,
                  "reward": total.reward / total.episodes, "success": total.solved / total.positions,
                  **({"recognized": total.recognized / max(1, total.read)} if args.vl else {}),
                  "kl1": total.k1 / total.actions, "kl3": total.k3 / total.actions,
                  **{name: value / max(1, updates) for name, value in stats.items()},
                  "ratio_error": ratio_error, "updates": updates, "lr": args.lr * factor,
                  "explained_var": 1 - ((returns - values).var() / (returns.var() + 1e-8)).item(),
                  "turns": total.turns / total.episodes, "tokens_per_answer": total.actions / total.turns,
                  "cut": total.cut / total.turns,
                  "verdicts": {v: getattr(total, v) / total.turns for v in env_class.verdicts},
                  "tokens_per_s": total.trained / seconds, "episodes_per_s": total.episodes / seconds,
                  "seconds": seconds, "sampling_seconds": sampling_seconds, "memory_gb": sft.peak_memory_gb(run)}
        bar.update(min(100, 100 * progress) - bar.n)
        bar.set_postfix_str(f"success {record['success']:.2f} {monitor_text}")
        if iteration % args.log_every == 0:
            key = {"reward": ".2f", "success": ".2f", **({"recognized": ".2f"} if args.vl else {}),
                   "turns": ".2f", "kl1": ".4f", "kl3": ".4f",
                   "clip_fraction": ".3f", "entropy": ".3f", "explained_var": ".2f", "tokens_per_answer": ".1f",
                   "tokens_per_s": ",.0f", "episodes_per_s": ".0f", "flops": ".3g", "memory_gb": ".1f"}
            say(run, f"KEY {iteration:3d}", *(f"{k} {record.get(k, 0):{how}}" for k, how in key.items()),
                *(f"{v} {p:.2f}" for v, p in record["verdicts"].items()))
        if log:
            log.write(json.dumps(record) + "\n")
            with open(os.path.join(folder, "episodes.txt"), "a") as f:
                for e in episodes[:2] if iteration % 10 == 1 else []:
                    f.write(f"---- iteration {iteration}, success {e.success}\n" + "\n".join(
                        f"{tok.decode(s.ids)}" for s in e.segments) + f"\nrewards {[t['reward'] for t in e.turns]}\n")
        if math.floor(last * args.saves) < math.floor(progress * args.saves) and progress < 1:
            save_now()
    bar.close()

    signal.signal(signal.SIGINT, interrupt.before)
    save_now()
    if busy:
        sft.report_speed("rl", run, log, model, iteration, flops - state.get("flops", start_flops), busy,
                         time.perf_counter() - begun)
    if log:
        log.close()
    if interrupt.stopped:
        say(run, f"stopped at iteration {iteration} and saved; go on with --resume")
        raise SystemExit(130)


def flags():
    parser = Parser(__doc__)
    add = shared_flags(parser)
    add("--init", metavar="PATH", default=None)                 # policy and reference; default: built if missing
    add("--name", default="rl")                                 # the run's folder: out/ENV/RULE/NAME
    add("--tokens", type=positive(float), default=None)         # compute X / 6N, as in sft.py; gp 1.2e6, virl 8e5
    add("--steps", type=positive(int), default=None)            # stop after this many iterations at the latest
    add("--base_tokens", type=positive(float), default=None)    # for a base that has to be built
    add("--init_tokens", type=positive(float), default=None)    # for an init that has to be built
    # rollout
    add("--batch", type=positive(int), default=None)            # episodes an iteration, rank; gp 128, virl 32
    # the objective
    add("--gamma", type=share, default=None)             # discount per token (the paper: 0.9 per turn); gp 1, virl 0.95
    add("--lam", type=share, default=0.95)               # GAE lambda, per token (the paper: 0.95)
    add("--beta", type=non_negative, default=0.02)              # KL penalty per token (the release: none)
    add("--clip", type=positive(float), default=0.2)            # epsilon (the paper: 0.1)
    add("--clip_value", type=positive(float), default=None)     # how far a value may move per iteration; gp 0.5, virl 5
    add("--coef_value", type=non_negative, default=0.1)         # weight of the value loss (the paper: 0.5)
    add("--coef_entropy", type=non_negative, default=0.0)       # weight of the entropy bonus
    # the update
    add("--lr", type=positive(float), default=None)             # AdamW, policy; both 1e-4
    add("--lr_value", type=positive(float), default=None)       # AdamW, value head; gp 1e-3, virl 1e-2
    add("--decay", type=share, default=None)             # last share of the budget with lr going to 0; gp --vl: 0.5
    add("--epochs", type=positive(int), default=2)              # passes over each iteration's data (the paper: 4)
    add("--minibatches", type=positive(int), default=4)         # optimizer steps an epoch
    add("--target_kl", type=positive(float), default=0.05)      # end the epochs when approx_kl exceeds this
    add("--clip_grad", type=positive(float), default=1.0)       # gradient norm is clipped to this
    # bookkeeping
    add("--monitors", type=positive(int), default=6)            # success rates are measured this often a run
    add("--monitor_episodes", type=positive(int), default=100)  # per column
    add("--log_every", type=positive(int), default=1)           # iterations between KEY lines
    add("--saves", type=positive(int), default=4)               # checkpoints a run
    add("--resume", action="store_true")                        # continue an interrupted run from its checkpoint
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    args.k = 1
    if args.temperature == 0:
        fail("--temperature 0: PPO needs samples; choose a value above 0")
    for key, value in (ENVS[args.env].ppo_vl if args.vl else ENVS[args.env].ppo).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.minibatches > args.batch:
        fail(f"--minibatches {args.minibatches} is more than --batch {args.batch}: a minibatch would be empty")
    run = setup(args)
    folder = os.path.join(trained_on(args), args.name)
    finished = False
    if checkpoint_at(folder):
        same_flags(folder, args, ["model", "init", "data", "verify", "seed", "pixels"] if args.resume else None)
        finished = load_state(folder).get("done") and not args.resume
        if not finished and not args.resume:
            fail(f"{folder} holds an unfinished run: continue it with --resume, or choose another --name or --out")
    init = args.init or sft.build(args, run, "init")
    if finished:
        say(run, f"[rl] found, not trained again: {folder}")
    else:
        train(args, run, init, folder)

    paths = found_checkpoints(args)
    keep = {k: v for k, v in paths.items() if k in ("base", "init", "sft")}
    if args.init:
        keep = {"init": init, **{k: v for k, v in keep.items() if k == "base" and v != init}}
    result = table({**keep, args.name: folder}, args, run)
    if run.rank == 0:
        write_json(os.path.join(folder, "eval.json"), result)
        print(f"next: python sft.py {task_flags(args, 'sft')}    # SFT at the same compute")


if __name__ == "__main__":
    script(main)
