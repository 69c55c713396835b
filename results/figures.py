"""results/figures.py: what was measured, in tables and pictures. Reads raw files, trains nothing.

    python results/figures.py table results/raw/main-gp-id-s?.json # each seed's number, mean, differences
    python results/figures.py table results/raw/main-virl-id-s?.json --part turns    # other parts: see PARTS
    python results/figures.py choose results/raw/rates-gp-id-s?.json     # the grid by ID: which rate is chosen
    python results/figures.py course results/raw/gp-id-s?-dose.jsonl                 # success on the way
    python results/figures.py matched results/raw/gp-id-s?-{sft-2e-4,rl-5e-5}.jsonl # OOD at equal seen accuracy
    python results/figures.py claims main-gp           # the claims of results/claims.txt, all or a section's, tested
    python results/figures.py bars results/main.png results/raw/main-{gp,virl}-{id,ood}-s?.json
    python results/figures.py curves results/curves.png results/raw/gp-{id,ood}-s?-{sft-2e-4,rl-5e-5}.jsonl
    python results/figures.py ppo results/raw/gp-id-s?-rl-5e-5.jsonl   # ranges of PPO's metrics
    python results/figures.py speed out/gp/base                    # training steps against a matrix product
    python results/figures.py memory                               # what a GPU must hold, by size of the model

A difference between two models is paired by seed. A * means p < 0.05 in a two-sided paired t test: with three
seeds 4.3 standard errors, with four 3.2, with five 2.8. The tables print many differences, and the * is not
corrected for their number: some carry it by chance. Only `claims` corrects, for the claims of claims.txt.
"""
import argparse
import glob
import json
import math
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

PARTS = {"within": lambda cell: cell, "first": lambda cell: cell["first"],  # of a cell
         "turns": lambda cell: cell["matters"], "turns-first": lambda cell: cell["matters"]["first"],
         "paper": lambda cell: cell["paper"], "episode": lambda cell: cell["episode"],
         "read": lambda cell: cell["recognition"]["whole"], "solved": lambda cell: cell["recognition"]["solved"],
         "other": lambda cell: cell["other_rule"]}
CHOSEN = {"gp": ("init", "sft-2e-4", "rl-5e-5"), "virl": ("init", "sft-2e-3", "rl-5e-5")}  # SFT_LR, RL_LR of make.sh
PAPER = {("gp", "id"): (11.5, 3.4, 15.0), ("virl", "id"): (80.8, 1.3, 91.8)}  # OOD of init, SFT, RL, in percent
CLAIMS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "claims.txt")


def fail(message):
    raise SystemExit(f"error: {message}")


def read_tables(files):
    """eval.json files of several seeds -> their dicts, with the models that all of them have. They must agree in
    task and settings and differ in seed."""
    tables = []
    for file in files:
        try:
            with open(file) as f:
                tables.append(json.load(f))
            first, this = ([t[key] for key in ("env", "vl", "trained_rule", "trained_visual", "verify",
                                               "temperature", "episodes")] for t in (tables[0], tables[-1]))
            names = [{row["name"] for row in t["rows"]} for t in tables]
        except (OSError, ValueError, KeyError, TypeError) as e:
            fail(f"{file} is not a table of eval.py (eval.json): {e!r}")
        if first != this or tables[-1]["seed"] in [t["seed"] for t in tables[:-1]]:
            fail(f"{file} is not {files[0]} with another seed: task and settings must agree, seeds differ")
    order = [row["name"] for t in tables[:1] for row in t["rows"]]
    for t in tables:
        t["rows"] = sorted((row for row in t["rows"] if all(row["name"] in found for found in names)),
                           key=lambda row: order.index(row["name"]))
    return tables


def mean_se(values):
    """Numbers of the seeds -> (mean, its standard error)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / max(1, n - 1) / n)


def p_value(t, df):
    """Two-sided p of Student's t with an integer number of degrees of freedom (Abramowitz and Stegun, 26.7.3-4)."""
    angle = math.atan2(abs(t), math.sqrt(df))
    total, term = 0.0, math.cos(angle) ** (df % 2)
    for power in range(df % 2, df - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 1 - (2 / math.pi * (angle + total) if df % 2 else total)


def paired_test(differences):
    """One difference a seed -> (mean, its standard error, |mean| in standard errors, p of the paired t test). With
    one seed nothing can be tested: p = 1."""
    mean, se = mean_se(differences)
    t = abs(mean) / max(se, 1e-9)
    return mean, se, min(99.0, t), p_value(t, len(differences) - 1) if len(differences) > 1 else 1.0


def numbers(tables, row, column, part):
    """Percent, one number a seed."""
    return [100 * PARTS[part](t["rows"][row][column])["p"] for t in tables]


def print_tables(files, part, chosen=None):
    """Every seed's number and their mean, a line a model; then differences between models, paired by seed. A *
    means p < 0.05 for this one difference, not corrected for the number of differences printed."""
    tables = read_tables(files)
    for t in tables:
        t["rows"] = [row for row in t["rows"] if not chosen or row["name"] in chosen]
    rows = tables[0]["rows"]
    if lost := set(chosen or []) - {row["name"] for row in rows}:
        fail(f"--rows: no row {sorted(lost)[0]} in {files[0]}")
    columns = [c for c in ("seen", "id", "ood", "visual") if c in rows[0]]
    print(f"{tables[0]['env']}, trained rule {tables[0]['trained_rule']}, "
          f"seeds {[t['seed'] for t in tables]}, {tables[0]['episodes']} episodes a cell, "
          f"at most {tables[0]['verify']} attempts, --part {part}, percent: each seed | mean")
    wide, name_width = max(30, 6 * len(tables) + 8), max(14, *(len(row["name"]) + 1 for row in rows))
    print(" " * name_width + "".join(f"| {c:^{wide}}" for c in columns))
    for i, row in enumerate(rows):
        cells = [numbers(tables, i, c, part) for c in columns]
        print(row["name"].ljust(name_width) + "".join(
            "| " + f"{' '.join(f'{x:5.1f}' for x in v)} | {mean_se(v)[0]:5.1f}".ljust(wide) for v in cells).rstrip())
    if len(tables) > 1:
        print("differences: each seed | mean, in standard errors; * = p < 0.05, uncorrected")
        for i, row in enumerate(rows):
            for j in range(i):
                text = f"{row['name']} - {rows[j]['name']}".ljust(2 * name_width + 2)
                for c in columns[1:]:
                    d = [a - b for a, b in zip(numbers(tables, i, c, part), numbers(tables, j, c, part))]
                    mean, _, t, p = paired_test(d)
                    text += (f"| {c} {' '.join(f'{x:+6.1f}' for x in d)} | {mean:+6.1f}, {t:4.1f}"
                             + "*" * (p < 0.05)).ljust(20 + 8 * len(d))
                print(text.rstrip())


def print_claims(section=None):
    """Each claim of claims.txt: the difference of its two rows, paired by seed, and whether a t test confirms the sign.

    The p values are corrected by Holm's method within a section: the smallest of m must be at most 0.05 / m, the next
    one 0.05 / (m - 1), and so on up to the first that fails. Verdicts: established, the claimed sign and significant;
    tendency, the claimed sign in every seed; unclear, in the mean only; no, the other sign; reversed, the other sign and
    significant."""
    raw, claims = os.path.join(os.path.dirname(CLAIMS), "raw"), {}  # {section: [[the claim, its test], ...]}
    with open(CLAIMS) as f:
        for line in f:
            words = line.split("#")[0].split()
            if words and section in (None, words[0]):
                _, stem, part, column, row, sign, other = words
                tables, differences = read_tables(sorted(glob.glob(os.path.join(raw, f"{stem}-s[0-9]*.json")))), []
                names = [r["name"] for r in tables[0]["rows"]] if tables else []
                if row in names and other in names:
                    differences = [a - b for a, b in zip(*(numbers(tables, names.index(name), column, part)
                                                           for name in (row, other)))]
                claims.setdefault(words[0], []).append((words, differences))
    if not claims:
        fail(f"{CLAIMS} has no claims of a section {section}")
    print("section, raw files, part, column, claim | difference in points ± standard error, seeds, p | after Holm")
    for of_section in claims.values():
        p_values = [paired_test(d)[-1] for _, d in of_section if d]
        significant = holm(p_values)
        for words, d in of_section:
            text = "{:13} {:19} {:6} {:6} {} {} {}".format(*words)
            if not d:
                print(f"{text:77} | not run")
                continue
            mean, se, _, p = paired_test(d)
            sign = 1 if words[5] == ">" else -1
            weak = "tendency" if all(sign * x > 0 for x in d) else "unclear" if sign * mean > 0 else "no"
            verdict = (weak, "established" if sign * mean > 0 else "reversed")[significant.pop(0)]
            print(f"{text:77} | {mean:+6.1f} ± {se:4.1f}, n = {len(d)}, p "
                  + (f"= {p:.4f}" if p >= 1e-4 else "< 0.0001") + f" | {verdict}")


def holm(p_values, level=0.05):
    """Holm's step-down method -> [True where significant, ...], in the order given."""
    order, significant = sorted(range(len(p_values)), key=p_values.__getitem__), [False] * len(p_values)
    for k, i in enumerate(order):
        if p_values[i] > level / (len(order) - k):
            break
        significant[i] = True
    return significant


def choose(files):
    """Of the runs whose names begin alike (sft-..., rl-...): the one with the best mean ID. SFT must also
    have learnt its training set (mean seen of 85% or more), if any run has. OOD plays no part."""
    tables = read_tables(files)
    part = "turns" if tables[0]["env"] == "virl" else "within"
    for method in ("sft", "rl"):
        runs = [(row["name"], mean_se(numbers(tables, i, "id", part))[0],
                 mean_se(numbers(tables, i, "seen", part))[0])
                for i, row in enumerate(tables[0]["rows"]) if row["name"].startswith(method + "-")]
        learnt = [r for r in runs if r[2] >= 85] if method == "sft" else runs
        for name, by_id, seen in runs:
            print(f"{name:12} ID {by_id:5.1f}  seen {seen:5.1f}")
        if runs:
            print(f"chosen by ID: {max(learnt or runs, key=lambda r: r[1])[0]}")


def read_metrics(file):
    """metrics.jsonl -> (header, records); a damaged line is left out."""
    records = []
    try:
        with open(file) as f:
            for line in f:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue
        return records[0], records[1:]
    except (OSError, IndexError) as e:
        fail(f"{file} is not a metrics.jsonl of sft.py or rl.py: {e!r}")


def points_of(file):
    """metrics.jsonl -> (header, the records in which success was measured on the way). The init's and the run's
    own row come from the larger table in the same folder, raw/main-gp-id-s0.json or raw/dose-gp-id-s0.json
    for raw/gp-id-s0-NAME.jsonl, where there is one."""
    header, records = read_metrics(file)
    folder, task = os.path.split(file.removesuffix(f"-{header['name']}.jsonl"))
    points = list({r["step"]: r for r in records if "seen" in r}.values())  # a resume may measure one again
    for section in ("main", "dose"):
        table = os.path.join(folder, f"{section}-{task}.json")
        rows = {row["name"]: row for row in read_tables([table])[0]["rows"]} if os.path.isfile(table) else {}
        if header["name"] in rows:
            points = [{"flops": records[0]["flops"], **rows["init"]},
                      *(r for r in points if r["step"] not in (0, records[-1]["step"])),
                      {"flops": records[-1]["flops"], **rows[header["name"]]}]
            break
    if not points:
        fail(f"{file}: its run has not got as far as a first success rate")
    return header, points


def print_course(files, part):
    """One run over several seeds: success at each of its evaluations, a line an evaluation."""
    runs = [points_of(file)[1] for file in files]
    print("share of the budget | percent: each seed | mean; OOD's change since the first, in standard errors")
    spent = [p["flops"] - runs[0][0]["flops"] for p in runs[0]]
    for i in range(min(map(len, runs))):
        text = f"{spent[i] / max(1, spent[-1]):4.2f}"
        for column in ("seen", "id", "ood"):
            now, first = ([100 * PARTS[part](run[k][column])["p"] for run in runs] for k in (i, 0))
            text += f" | {column} {' '.join(f'{x:5.1f}' for x in now)} | {mean_se(now)[0]:5.1f}"
        change, _, t, p = paired_test([a - b for a, b in zip(now, first)])  # of OOD, the last column
        print(f"{text}; {change:+6.1f}, {t:4.1f}" + "*" * (p < 0.05))


def at_seen(points, level, part):
    """OOD where a run's seen accuracy first reaches `level` percent, between two measurements by a straight
    line; None if it never does."""
    curve = [(100 * PARTS[part](p["seen"])["p"], 100 * PARTS[part](p["ood"])["p"]) for p in points]
    for (seen, ood), (seen_next, ood_next) in zip(curve, curve[1:]):
        if seen <= level <= seen_next:
            return ood + (ood_next - ood) * (level - seen) / max(1e-9, seen_next - seen)
    return None


def print_matched(files, part):
    """OOD of SFT and RL at the same seen accuracy, in place of the same compute: each seed and the mean."""
    runs = {"SFT": {}, "RL": {}}
    for file in files:
        header, points = points_of(file)
        runs["RL" if header["run"] == "rl" else "SFT"][header["seed"]] = points
    seeds = sorted(runs["SFT"].keys() & runs["RL"].keys())
    print("OOD at equal seen accuracy, percent: each seed | mean; difference, in standard errors; seeds")
    for level in range(60, 100, 5):
        pairs = {s: [at_seen(runs[method][s], level, part) for method in runs] for s in seeds}
        pairs = {s: pair for s, pair in pairs.items() if None not in pair}  # else one of the two is never there
        if len(pairs) > 2:
            change, _, t, p = paired_test([rl - sft for sft, rl in pairs.values()])
            sft, rl = (f"{' '.join(f'{x:5.1f}' for x in row)} | {mean_se(row)[0]:5.1f}"
                       for row in zip(*pairs.values()))
            print(f"seen {level} | SFT {sft} | RL {rl} | RL - SFT {change:+6.1f}, {t:4.1f}{'*' * (p < 0.05)} | "
                  f"{list(pairs)}")


def curves(picture, files):
    """Success against fine-tuning compute, a panel a task and rule: mean over seeds, band of one standard
    error. V-IRL at the turns, where the rules differ."""
    plt, runs = pyplot(), {}
    for file in files:
        header, points = points_of(file)
        task = (header["env"] + "-vl" * header["vl"], header["rule"])
        runs.setdefault(task, {}).setdefault("RL" if header["run"] == "rl" else "SFT", []).append(points)
    fig, axes = plt.subplots(1, len(runs), figsize=(4.6 * len(runs), 3.7), sharey=True, squeeze=False)
    titles = {"gp": "GeneralPoints", "virl": "V-IRL, turns", "gp-vl": "GeneralPoints-VL",
              "virl-vl": "V-IRL-VL, turns"}
    for ax, (task, methods) in zip(axes[0], sorted(runs.items())):
        for method, of_method in sorted(methods.items()):
            n = min(map(len, of_method))
            x = [sum(run[i]["flops"] for run in of_method) / len(of_method) / 1e12 for i in range(n)]
            for column, style in (("seen", ":"), ("id", "--"), ("ood", "-")):
                pick = PARTS["turns" if task[0].startswith("virl") else "within"]
                points = [mean_se([100 * pick(run[i][column])["p"] for run in of_method]) for i in range(n)]
                color = {"SFT": "C3", "RL": "C0"}[method]
                label = f"{method} {dict(seen='seen', id='ID', ood='OOD')[column]}"
                ax.plot(x, [m for m, _ in points], style, color=color, label=label)
                ax.fill_between(x, [m - s for m, s in points], [m + s for m, s in points], color=color,
                                alpha=0.12, linewidth=0)
        ax.set_title(f"{titles[task[0]]}, trained on rule {task[1]}", fontsize=10)
        ax.set_xlabel("fine-tuning compute, TFLOP")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("success within the attempts, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.tight_layout(rect=(0, 0.09, 1, 1))
    fig.legend(handles, labels, fontsize=9, ncol=6, loc="lower center")
    fig.savefig(picture, dpi=120)
    print("drawn:", picture, "from", len(files), "runs")


def pyplot():
    try:
        import matplotlib
    except ImportError:
        fail("pictures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def bars(picture, files):
    """ID and OOD of init, SFT and RL at the chosen rates: a panel a task and rule. A bar is the mean over seeds, a dot
    a seed, a hollow diamond the paper's number, where it has one. V-IRL by the paper's metric."""
    plt, groups = pyplot(), {}
    for file in files:
        with open(file) as f:
            t = json.load(f)
        groups.setdefault((t["env"], t["trained_rule"]), []).append(t)
    titles = {"gp": "GeneralPoints", "virl": "V-IRL"}
    metrics = {"gp": "hands solved within 5 attempts, %", "virl": "share of correct answers,\nevery attempt counts, %"}
    fig, axes = plt.subplots(1, len(groups), figsize=(3.4 * len(groups), 4), sharey=True, squeeze=False)
    for ax, ((env, rule), tables) in zip(axes[0], groups.items()):
        for i, (name, color) in enumerate(zip(CHOSEN[env], ("0.6", "C3", "C0"))):
            for at, column in enumerate(("id", "ood")):
                pick = PARTS["paper" if env == "virl" else "within"]
                rows = [next(row for row in t["rows"] if row["name"] == name) for t in tables]
                seeds = [100 * pick(row[column])["p"] for row in rows]
                x = at + 0.27 * (i - 1)
                ax.bar(x, sum(seeds) / len(seeds), 0.24, color=color, alpha=0.75,
                       label=("init", "SFT", "RL")[i] if at == 0 else None)
                ax.plot([x] * len(seeds), seeds, "o", color="black", markersize=3,
                        label="one seed" if at == 0 and i == 2 else None)
                if column == "ood" and (env, rule) in PAPER:
                    ax.plot(x, PAPER[env, rule][i], "D", color="black", markerfacecolor="white", markersize=6,
                            label="the paper's model of 11B" if i == 2 else None)
        ax.set_xticks([0, 1], ["trained rule\n(ID)", "held-out rule\n(OOD)"], fontsize=9)
        ax.set_title(f"{titles[env]}, rule {rule} trained", fontsize=10)
        ax.set_ylabel(metrics[env], fontsize=9)
        ax.grid(axis="y", alpha=0.3)
    fig.suptitle("On the held-out rule SFT mostly loses success, and RL gains or keeps it")
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    handles, labels = axes[0][0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in ("init", "SFT", "RL"))  # bars, then marks
    fig.legend([handles[i] for i in order], [labels[i] for i in order], fontsize=9, ncol=5, loc="lower center")
    fig.savefig(picture, dpi=110)
    print("drawn:", picture, "from", len(files), "tables")


def ppo_ranges(files):
    """Of all iterations of some PPO runs: percentiles of each metric, and the last fifth's median."""
    records = [[r for r in read_metrics(file)[1] if "reward" in r] for file in files]
    print(f"{sum(map(len, records))} iterations of {len(files)} runs: 5%, 50%, 95% | "
          "median of each run's last fifth")
    for name in ("kl1", "kl3", "approx_kl", "clip_fraction", "ratio_error", "entropy", "explained_var",
                 "value_loss", "grad_norm", "updates", "tokens_per_answer", "cut"):
        values = sorted(r[name] for run in records for r in run if name in r)
        late = sorted(r[name] for run in records for r in run[-max(1, len(run) // 5):] if name in r)
        at = [values[min(len(values) - 1, int(q * len(values)))] for q in (0.05, 0.5, 0.95)]
        print(f"{name:18} {at[0]:10.3g} {at[1]:10.3g} {at[2]:10.3g} | {late[len(late) // 2]:10.3g}")


def speed(path):
    """Run the loops of sft.py and rl.py for a few steps, from nothing and from the tiny base at `path`, on the
    CPU in fp32. Prints the FLOP/s of a step (6 N a trained token) as a share of a bare matrix product of the
    model's shape, and the shares of its time that go into the rows and into clipping and the optimizer. PPO's
    step is one iteration's updates, without playing and scoring. Medians. Nothing else should run."""
    import contextlib
    import tempfile
    from statistics import median
    import torch
    import rl
    import sft
    from eval import load, saved_args
    saved, steps, minibatch = saved_args(path), [], {}
    if saved.get("stage") != "base":
        fail(f"{path} is not the folder of a base")
    model = load(path)[0]
    n, config = sum(p.numel() for p in model.parameters()), model.config.get_text_config()
    a, b = torch.randn(4096, config.hidden_size), torch.randn(config.hidden_size, config.intermediate_size)
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    product = 2 * a.numel() * b.shape[1] / median(times)
    print(f"matrix product {list(a.shape)} x {list(b.shape)}: {product / 1e9:.0f} GFLOP/s")

    def clocked(module, name):
        function = getattr(module, name)

        def run(*args, **keywords):
            begin = time.perf_counter()
            result, end = function(*args, **keywords), time.perf_counter()
            if name == "batch_rows":        # a step of sft.py begins
                steps.append({"begin": begin, "rows": end - begin, "optimizer": 0, "tokens": 0})
            elif name == "whiten":          # the last thing before PPO's updates
                steps.append({"begin": end, "rows": 0, "optimizer": 0, "tokens": 0})
            elif name == "micro_batches":
                minibatch["tokens"] = sum(len(s.ids) for part, _ in result for s in part)
            else:                           # clip_and_step, an update's last part
                steps[-1]["end"] = end
                steps[-1]["optimizer"] += end - begin
                steps[-1]["tokens"] += minibatch["tokens"]
            return result
        setattr(module, name, run)
    sft.EVERY["eval_episodes"] = 1
    for module, start in ((sft, "batch_rows"), (rl, "whiten")):
        for name in (start, "micro_batches", "clip_and_step"):
            clocked(module, name)
    task = f"--env {saved['env']} --episodes 0 --device cpu --dtype fp32".split()
    task += ["--vl", "--visual", saved["visual"]] if saved["vl"] else []
    for title, script, flags in (("base", sft, ["--stage", "base", "--steps", "12"]),
                                 ("SFT", sft, ["--init", path, "--steps", "12"]),
                                 ("PPO's updates", rl, ["--init", path, "--steps", "3"])):
        steps.clear()
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(None):
            script.main([*task, "--out", out, *flags])
        warm = [{**s, "seconds": s["end"] - s["begin"]} for s in steps[len(steps) // 3:]]
        rate = median(6 * n * s["tokens"] / s["seconds"] for s in warm)
        rows, optimizer = (median(s[part] / s["seconds"] for s in warm) for part in ("rows", "optimizer"))
        print(f"{title:14} {rate / 1e9:4.0f} GFLOP/s, {100 * rate / product:3.0f}% of the product; "
              f"of the time rows {100 * rows:3.0f}%, clipping and optimizer {100 * optimizer:3.0f}%")


def state_bytes(n, ppo, ranks=1):
    """Bytes on each GPU while a model of n parameters is trained in bf16 -> (all the time, at most). ranks: the
    GPUs that torchrun spreads the model over.

    All the time, for each parameter: the weight (4 bytes), its gradient (4) and AdamW's two moments (8), in
    fp32; with PPO also the reference's weight in bf16 (2). At most: all weights in bf16 (2) come on top. On one
    GPU these are autocast's copies in an update; with torchrun they are the weights that each rank gathers to
    sample. Not counted: activations, the cache of generate(), PPO's value head. The final table needs less: it
    holds one model at a time, in bf16."""
    held = n * (4 + 4 + 8 + 2 * ppo) / ranks
    return held, held + 2 * n


def memory():
    """What each GPU holds, in 10^9 bytes, for released sizes (parameters as their model cards count them)."""
    sizes = {"0.5B": 0.494e9, "1.5B": 1.54e9, "3B": 3.09e9, "7.6B": 7.62e9, "11B": 10.7e9}
    print("| held, and the most, GB | " + " | ".join(sizes) + " |\n|---|" + "---|" * len(sizes))
    for method, ranks in (("SFT", 1), ("PPO", 1), ("SFT", 8), ("PPO", 8)):
        pairs = [state_bytes(n, method == "PPO", ranks) for n in sizes.values()]
        print(f"| {method}, " + ("one GPU" if ranks == 1 else "eight GPUs (torchrun)") + " | "
              + " | ".join(f"{held / 1e9:.0f}, {most / 1e9:.0f}" for held, most in pairs) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["table", "choose", "course", "matched", "claims", "bars", "curves",
                                            "ppo", "speed", "memory"])
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--part", choices=PARTS, default="within")    # of the three printed tables: what counts
    parser.add_argument("--rows", nargs="+", metavar="NAME")          # of table: only these models
    args = parser.parse_args()
    needed = {"memory": 0, "claims": 0, "bars": 2, "curves": 2}.get(args.command, 1)
    if len(args.files) < needed:
        parser.error(f"{args.command} needs " + ("a picture and files" if needed == 2 else "files"))
    if args.command == "table":
        print_tables(args.files, args.part, args.rows)
    elif args.command == "choose":
        choose(args.files)
    elif args.command == "course":
        print_course(args.files, args.part)
    elif args.command == "matched":
        print_matched(args.files, args.part)
    elif args.command == "claims":
        print_claims(*args.files[:1])
    elif args.command == "bars":
        bars(args.files[0], args.files[1:])
    elif args.command == "curves":
        curves(args.files[0], args.files[1:])
    elif args.command == "ppo":
        ppo_ranges(args.files)
    elif args.command == "speed":
        speed(args.files[0])
    else:
        memory()


if __name__ == "__main__":
    try:
        main()
    except (KeyError, IndexError, ValueError, OSError) as e:
        fail(f"{sys.argv[1]}: these files do not hold what it shows: {e!r}")
