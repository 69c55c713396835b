"""results/variants.py: one change to a script, and then that script. Each change is a few lines beside the loop.

    python results/variants.py dft sft --env gp --rule id --name dft    # flags of sft.py or rl.py as ever
    python results/variants.py rules=8 sft --env gp --rule id --name rules8
    python results/variants.py group rl --env gp --rule id --name group --coef_value 0

    dft         SFT: each token's loss times the probability that the model gives it (arXiv 2508.05629)
    kl=1        SFT: plus this times KL(model || init), exact, at the scored positions
    own10       SFT on the model's own right answers, sampled anew every 10 steps (arXiv 2510.18874). Give --demos own
    rules=8     GeneralPoints: training deals come under this many face-card rules (arXiv 2510.00237)
    routes=16   V-IRL: the number of training routes
    noform      pretraining without the task's chat form. Give an --out of its own
    group       PPO without the critic: eight episodes a hand, and the mean of their rewards as the baseline
dft and kl are meant for a run whose init is there: on the way they would change the init too.
"""
import os
import sys

import torch

for folder in ("../assignments", ".."):
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), folder))
import env_gp  # noqa: E402
import env_virl  # noqa: E402
import eval as ev  # noqa: E402
import rl  # noqa: E402
import sft  # noqa: E402
from solutions import dft_loss  # noqa: E402


def dft(_):
    sft.sft_loss = dft_loss


def kl(beta):
    plain, initial = sft.sft_loss, {}

    def remember(path, device="cpu", dtype=torch.float32):
        if os.path.basename(path) == "checkpoint":
            ev.fail("kl does not resume: its init would be the checkpoint. Remove the run's folder")
        model, tok = ev.load(path, device, dtype)
        initial["model"] = ev.load(path, device, dtype)[0].requires_grad_(False)
        return model, tok

    def loss(model, rows, denominator, pad_id, run):
        logp = ev.forward(model, rows, pad_id, run)[1].log_softmax(-1)                # [N, V]
        with torch.no_grad():
            ref_logp = ev.forward(initial["model"], rows, pad_id, run)[1].log_softmax(-1)
        distance = (logp.exp() * (logp - ref_logp)).sum()
        return plain(model, rows, denominator, pad_id, run) + float(beta) * distance / denominator
    sft.sft_loss, sft.load = loss, remember


def own10(_):
    class Loop(sft.Loop):
        def goes_on(self):
            if self.step and self.step % 10 == 0:
                args = self.args
                envs = [ev.make(args, rule=args.rule, split="train", verify=1) for _ in range(512)]
                seeds = [f"own/{args.seed}/{self.step}/{i}" for i in range(512)]
                played = ev.rollout(self.model, self.tok, envs, seeds, 1.0, args.max_new_tokens, self.run)
                right = [[s for s, t in zip(e.segments, e.positions()) if t[0]["position_solved"]] for e in played]
                rows[:] = [r for r in right if r] or rows
                self.flops += 2 * self.n * sum(e.forwarded for e in played)
            return super().goes_on()
    rows, first = [], sft.own_demonstrations

    def demonstrations(*args):
        found, forwarded = first(*args)
        rows.extend(found)
        return rows, forwarded
    sft.Loop, sft.own_demonstrations, sft.OWN_EPISODES = Loop, demonstrations, 512


def rules(count):
    class ManyRules(env_gp.GeneralPoints):
        def __init__(self, split="train", **keywords):
            super().__init__(split=split, rules=int(count) if split == "train" else 1, **keywords)
    ev.ENVS["gp"] = ManyRules


def routes(count):
    env_virl.TRAIN_ROUTES = int(count)


def noform(_):
    sft.BASE["chat_share"] = 0.0


def group(_):
    rollout = rl.rollout

    def in_groups(model, tok, envs, seeds, *more):
        episodes = rollout(model, tok, envs, [f"{seed}/{i // 8}" for i, seed in enumerate(shared(seeds))], *more)
        paid = torch.tensor([sum(t["reward"] for t in e.turns) for e in episodes]).view(-1, 8)    # [groups, 8]
        for e, mean in zip(episodes, paid.mean(1).repeat_interleave(8).tolist()):
            e.baseline = mean
        return episodes

    def shared(seeds):
        return [seed.rpartition("/")[0] for seed in seeds]

    def advantages(e, reward_scale, beta, *_):
        total = sum(rl.token_rewards(s, reward_scale, beta).sum() for s in e.segments)
        for s in e.segments:
            s.advantage = torch.full_like(s.logp, total - e.baseline / reward_scale)
            s.returns = s.value
    rl.rollout, rl.estimate_advantages = in_groups, advantages


VARIANTS = {f.__name__: f for f in (dft, kl, own10, rules, routes, noform, group)}


def main(argv):
    name, _, value = (argv or [""])[0].partition("=")
    if name not in VARIANTS or len(argv) < 2 or argv[1] not in ("sft", "rl"):
        raise SystemExit(f"error: python results/variants.py VARIANT sft|rl FLAGS; variants: {', '.join(VARIANTS)}")
    VARIANTS[name](value)
    ev.script(lambda: {"sft": sft, "rl": rl}[argv[1]].main(argv[2:]))


if __name__ == "__main__":
    main(sys.argv[1:])
