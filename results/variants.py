"""results/variants.py: one change to a script, and then that script. Each change replaces a few functions.

    python results/variants.py dft sft --env gp --rule id --name dft    # flags of sft.py or rl.py, as usual
    python results/variants.py rules=8 sft --env gp --rule id --name rules8
    python results/variants.py group rl --env gp --rule id --name group --coef_value 0

    dft         SFT: each token's loss times the probability that the model gives it (arXiv 2508.05629)
    kl=1        SFT: plus this times KL(model || init), exact, at the scored positions
    own         SFT on self-generated demonstrations: the init's right first answers to 4,096 training episodes
    own10       the same, sampled anew from the current model every 10 steps, 512 episodes (arXiv 2510.18874)
    rules=8     GeneralPoints: training deals come under this many face-card rules, 2 or more (arXiv 2510.00237)
    routes=16   V-IRL: the number of training routes
    hands=2000  GeneralPoints: the number of training hands; all that are not test hands if there are fewer
    mute        GeneralPoints from pictures, SFT: no loss on the answer's field "cards"
    noform      pretraining without the task's chat form. Give an --out of its own
    frozen      the embeddings are not trained
    group       PPO without the critic: eight episodes a hand, and the mean of their rewards as the baseline
The change is made when the last stage, sft or rl, begins to train. A base and an init that are made on the way are
the usual ones; noform changes only the base. Give --resume together with the same variant: args.json names it.
"""
import argparse
import os
import random
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
    plain, load_model, initial = sft.sft_loss, sft.load_model, {}

    def load_both(path, args, machine):
        initial["model"], _ = load_model(args.init, args, machine, trained=False)
        return load_model(path, args, machine)

    def loss(model, rows, denominator, pad_id, machine):
        logp = ev.forward(model, rows, pad_id, machine)[1].log_softmax(-1)            # [N, V]
        with torch.no_grad():
            ref_logp = ev.forward(initial["model"], rows, pad_id, machine)[1].log_softmax(-1)
        distance = (logp.exp() * (logp - ref_logp)).sum()
        return plain(model, rows, denominator, pad_id, machine) + float(beta) * distance / denominator
    sft.sft_loss, sft.load_model = loss, load_both


def own(_, episodes=4096, every=None):
    """Sampling counts as compute: the first sample in the flops that the run starts with, later ones in the tokens
    of their step, a third of a token for each token that was forwarded (2 N of 6 N)."""
    load_checkpoint, all_sum, pool, shared = sft.load_checkpoint, sft.all_sum, [], {"uncounted": 0}

    def sample(model, tok, args, machine, label):
        """Put the rows of an episode's right first answers into pool, an entry an episode -> tokens forwarded."""
        seeds = [f"own/{args.seed}{label}/{i}" for i in range(machine.rank, episodes, machine.world)]
        envs = [ev.make(args, rule=args.rule, split="train", verify=1) for _ in seeds]
        played = ev.rollout(model, tok, envs, seeds, 1.0, args.max_new_tokens, machine)
        right = [[s for s, turns in zip(e.segments, e.positions()) if turns[0]["position_solved"]] for e in played]
        pool[:] = [rows for rows in right if rows] or pool
        return sum(e.forwarded for e in played)

    def seeded(args, step, rank):
        rng = random.Random(f"{args.stage}/{args.seed}/{step}/{rank}")
        torch.manual_seed(rng.randrange(2 ** 31))
        return rng

    def first_sample(args, machine):
        path, state, tensors = load_checkpoint(args, machine)
        model, tok = sft.load_model(args.init, args, machine, trained=False)
        torch.manual_seed(args.seed + machine.rank)
        forwarded = all_sum([sample(model, tok, args, machine, "")], machine)[0]
        if not pool:
            ev.fail(f"{args.init} solves no training episode, so it has nothing to learn from")
        if forwarded / 3 >= args.tokens:
            ev.fail(f"sampling costs as much as {forwarded / 3:,.0f} tokens of training: --tokens must be more")
        if state["step"] == 0:  # the flops of a resumed run have it already
            state["flops"] += 2 * sum(p.numel() for p in model.parameters()) * forwarded
        shared["machine"] = machine
        ev.print0(machine, f"{sum(map(len, pool))} right answers of the init in {episodes} episodes")
        return path, state, tensors

    def batch_rows(args, env, tok, model, step, rank):
        if every and step and step % every == 0:
            seeded(args, step - 1, rank)
            shared["uncounted"] = sample(model, tok, args, shared["machine"], f"/{step}") / 3
        rng = seeded(args, step, rank)
        return [row for rows in rng.sample(pool, min(args.batch, len(pool))) for row in rows]

    def count(values, machine):
        if len(values) == 2:  # tokens with loss, all tokens: the sum that a step's compute is made of
            values = [values[0], values[1] + shared["uncounted"]]
            shared["uncounted"] = 0
        return all_sum(values, machine)
    sft.load_checkpoint, sft.batch_rows, sft.all_sum = first_sample, batch_rows, count


def own10(_):
    own(_, episodes=512, every=10)


def face_rules(rule, count):
    """`count` rules of J, Q, K -> [(j, q, k), ...], the trained one first, never the held-out one."""
    rng, rules = random.Random("rules"), [env_gp.RULES[rule]]
    while len(rules) < count:
        faces = tuple(rng.randint(1, 13) for _ in "JQK")
        if faces not in [*rules, env_gp.RULES[env_gp.OTHER[rule]]]:
            rules.append(faces)
    return rules


def rules(count):
    class ManyRules(env_gp.GeneralPoints):
        """Training deals come under one of the rules each. Their hands are those of rule "ood"."""

        def reset(self, seed=None):
            if self.split != "train":
                return super().reset(seed)
            if self.vl:
                ev.fail("rules=N deals cards in words: leave out --vl")
            if seed is not None:
                self.rng = random.Random(f"gp/{seed}")
            stated, self.numbers = face_rules(self.rule, int(count)), []
            while tuple(sorted(self.numbers)) not in env_gp.training_hands("ood"):
                self.cards = self.rng.choices(env_gp.RANKS, k=4)
                faces = self.rng.choice(stated)
                self.numbers = env_gp.numbers_of(self.cards, faces)
            self.attempts, self.images = 0, []
            self.messages = [{"role": "user", "content": env_gp.fill(env_gp.PROMPT, self.cards, faces)}]
            return self.messages, self.images
    ev.ENVS["gp"] = ManyRules


def routes(count):
    env_virl.TRAIN_ROUTES = int(count)
    env_virl.training_routes.cache_clear()  # an init that was made on the way has filled it


def hands(count):
    env_gp.TRAIN_HANDS = int(count)
    env_gp.training_hands.cache_clear()


def mute(_):
    demonstration_row = sft.demonstration_row

    def without_cards(tok, model, messages, images, answer):
        """The row of a demonstration, with loss only behind `{"cards": [...], "number": [`."""
        row = demonstration_row(tok, model, messages, images, answer)
        name = '"number": ['  # one token holds the end of the cards and this name
        ids = tok(answer[:answer.index(name) + len(name)], add_special_tokens=False).input_ids
        first = row.action_mask.index(1)
        behind = first + len(ids)
        assert row.ids[first:behind] == ids and any(row.action_mask[behind:])
        row.action_mask[first:behind] = [0] * len(ids)
        return row
    sft.demonstration_row = without_cards


def noform(_):
    sft.BASE["chat_share"] = 0.0


def frozen(_):
    def patch(script):
        load_model = script.load_model

        def load(*args, **keywords):
            model, tok = load_model(*args, **keywords)
            model.get_input_embeddings().requires_grad_(False)  # tied: the output's matrix too
            return model, tok
        script.load_model = load
    patch(sft)
    patch(rl)


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


VARIANTS = {f.__name__: f for f in (dft, kl, own, own10, rules, routes, frozen, hands, mute, noform, group)}

BOUNDS = {"kl": (0, 1e9, float), "rules": (2, 2000), "routes": (1, 10_000), "hands": (1, 10_000)}  # of VARIANT=value


def main(argv):
    name, _, value = (argv or [""])[0].partition("=")
    if name not in VARIANTS or len(argv) < 2 or argv[1] not in ("sft", "rl") or "--stage" in argv:
        raise SystemExit("error: python results/variants.py VARIANT sft|rl FLAGS, without --stage; variants: "
                         + ", ".join(VARIANTS))
    try:
        if name in BOUNDS:
            ev.number(*BOUNDS[name])(value)
        elif value:
            raise ValueError("this variant takes no value")
    except (ValueError, argparse.ArgumentTypeError) as e:
        ev.fail(f"{argv[0]}: {e}")
    script = {"sft": sft, "rl": rl}[argv[1]]
    train = script.train

    def changed(args, machine, stop):
        if args.stage == argv[1]:  # else it is an earlier stage
            if args.resume and getattr(args, "variant", None) != argv[0]:
                ev.fail(f"--resume: {args.folder} was made by variant {getattr(args, 'variant', None)}")
            if name == "group" and args.batch % 8:
                ev.fail(f"--batch {args.batch}: group plays eight episodes of a hand, so it needs a multiple of 8")
            args.variant = argv[0]
            if name != "noform":
                VARIANTS[name](value)
        return train(args, machine, stop)
    script.train = changed
    if name == "noform":  # before the flags are read: the base is an earlier stage
        noform(value)
    ev.script(lambda: script.main(argv[2:]))


if __name__ == "__main__":
    main(sys.argv[1:])
