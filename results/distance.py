"""results/distance.py: is the held-out rule lost in proportion to the distance from the init (arXiv 2509.04259)?

    python results/distance.py measure --env gp --seed 0 --out out/study/s0 --models out/study/s0/gp/id/init ...
    python results/distance.py fit results/raw/distance-gp-*.json results/raw/{main,rates}-gp-id-s?.json

measure: KL(init || model) by the init's samples and KL(model || init) by the model's, nats per answer, on prompts of the
trained rule, at first answers where the two rules differ. The first of --models is the init. 100 unseen episodes each.
-> distance.json beside eval.json: {"env", "trained_rule", "seed", "rows": [{"name", "forward", "reverse", "n"}, ...]}
fit: for each run that has a distance and a row in a table of eval.py, the OOD lost since the init (V-IRL: of turns), in
points, against log(1 + KL) by least squares; R^2 with the 95% interval of 2,000 bootstrap samples of runs.
Each seed is a point of its own; the lines of runs show means over seeds.
"""
import json
import os
import random
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import numpy as np  # noqa: E402

EPISODES = 100
KINDS = {"all": "", "SFT on the expert": r"sft-\d|dose|quarter", "RL from the init": "rl-|verify|nokl|gamma|group"}


def differing_answers(episodes):
    """-> [Segment] of each position's first answer at which the rules differ, nothing after it."""
    from eval import Segment
    cut = []
    for e in episodes:
        for s, turns in zip(e.segments, e.positions()):
            if turns[0]["rule_matters"]:
                end = s.action_mask.index(1) + turns[0]["tokens"]
                cut.append(Segment(s.ids[:end], s.action_mask[:end]))
    return cut


def measure(argv):
    import torch
    import eval as ev
    from sft import micro_batches
    parser = ev.new_parser(__doc__)
    parser.add_argument("--models", nargs="+", required=True, metavar="PATH", help="the init, then the runs")
    args = ev.parse(parser, argv)
    machine, rows = ev.setup(args), []
    init, tok = ev.load(args.models[0], machine.device, machine.frozen)
    longest = args.max_new_tokens or ev.saved_args(args.models[0]).get("max_new_tokens", 256)
    keywords = ev.columns(args)["id"]

    def distance(sampler, other):
        """KL(sampler || other) by the sampler's answers: the mean of their summed log-ratios -> (nats, answers)."""
        torch.manual_seed(args.seed)
        envs = [ev.make(args, verify=1, **keywords) for _ in range(EPISODES)]
        answers = differing_answers(ev.rollout(sampler, tok, envs, [f"eval/{i}" for i in range(EPISODES)],
                                               args.temperature, longest, machine))
        total = 0.0
        with torch.no_grad():
            for part, _ in micro_batches(answers, 2048, machine):
                a, b = (ev.score(m, part, tok.pad_token_id, machine, args.temperature)[0] for m in (sampler, other))
                total += (a - b).sum().item()
        return total / len(answers), len(answers)
    for path in args.models[1:]:
        model, _ = ev.load(path, machine.device, machine.frozen)
        (forward, n), (reverse, _) = distance(init, model), distance(model, init)
        rows.append({"name": os.path.basename(os.path.normpath(path)), "forward": forward, "reverse": reverse, "n": n})
        print(f"{rows[-1]['name']:20} forward {forward:7.3f}  reverse {reverse:7.3f}  {n} answers", flush=True)
    file = os.path.join(os.path.dirname(ev.run_folder(args, "rl")), "distance.json")
    ev.write_json(file, {"env": args.env, "trained_rule": args.rule, "seed": args.seed, "rows": rows})
    print("written:", file)


def r_squared(x, y):
    return float(np.corrcoef(x, y)[0, 1] ** 2) if np.std(x) > 0 and np.std(y) > 0 else 0.0


def fit(files):
    lost, found = {}, []
    contents = [json.load(open(file)) for file in files]
    for t in (c for c in contents if "episodes" in c):  # tables of eval.py
        ood = {row["name"]: 100 * (row["ood"]["matters"] if t["env"] == "virl" else row["ood"])["p"] for row in t["rows"]}
        for name, p in ood.items():
            lost[t["env"], t["trained_rule"], t["seed"], name] = ood["init"] - p
    for c in (c for c in contents if "episodes" not in c):
        for row in c["rows"]:
            key = (c["env"], c["trained_rule"], c["seed"], row["name"])
            if key in lost:
                found.append((key, row["forward"], row["reverse"], lost[key]))
    runs = {}
    for key, *numbers in found:
        runs.setdefault((key[0], key[1], key[3]), []).append(numbers)
    for (env, rule, name), rows in sorted(runs.items(), key=lambda run: np.mean(run[1], 0)[0]):
        forward, reverse, points = np.mean(rows, 0)
        print(f"{env:5} {rule:4} {name:18} forward {forward:7.3f}  reverse {reverse:7.3f}  OOD lost {points:6.1f}  "
              f"n = {len(rows)}")
    for label, names in KINDS.items():
        some, rng = [f for f in found if re.match(names, f[0][3])], random.Random(0)
        for direction, column in (("forward", 1), ("reverse", 2)) if len(some) > 2 else ():
            x, y = np.log1p([max(0, f[column]) for f in some]), np.array([f[3] for f in some])
            draws = [[rng.randrange(len(some)) for _ in some] for _ in range(2000)]
            low, high = np.percentile([r_squared(x[d], y[d]) for d in draws], (2.5, 97.5))
            print(f"{label}, {direction}: R^2 {r_squared(x, y):.2f}, 95% interval {low:.2f} to {high:.2f}, "
                  f"{len(some)} runs")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        from eval import script
        script(lambda: measure(sys.argv[2:]))
    elif sys.argv[1:2] == ["fit"] and len(sys.argv) > 2:
        fit(sys.argv[2:])
    else:
        sys.exit("error: python results/distance.py measure FLAGS | fit FILES; see the first lines of this file")
