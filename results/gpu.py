"""results/gpu.py: what results/gpu.sh cannot say in bash. FILES is the folder of its plain files.

    python results/gpu.py build FOLDER SIZE              # a Qwen2 of that size with random weights, and a tokenizer
    python results/gpu.py same FILE MODEL DEVICE DTYPE   # one model's numbers on DEVICE and on the CPU in fp32
    python results/gpu.py measure FILE sft|rl FLAGS      # a few steps: seconds of each part, GB held
    python results/gpu.py spent RUN                      # tokens (X / 6N) that a run has used up
    python results/gpu.py curve RUN TABLE FILE           # its metrics.jsonl, with its row of the table as the last record
    python results/gpu.py summary FILES                  # a line a check: PASS or FAIL, with its numbers
"""
import gc
import glob
import json
import math
import os
import sys
import time
from statistics import median
from types import SimpleNamespace

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, ".."), HERE]
SIZES = {  # Qwen2.5's: hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 4096), "0.5B": (896, 4864, 24, 14, 2, 151936), "1.5B": (1536, 8960, 28, 12, 2, 151936)}
SPREAD = {"gp": 0.08, "virl": 0.03}  # standard deviation of success between seeds, in results/raw/main-*
# Largest |log ratio|: between what was sampled and what is scored, between two devices, before PPO's first step; and the
# loss of the first ten steps of the base, relative.
BOUNDS = {"fp32": (1e-3, 1e-3, 1e-3, 1e-3), "bf16": (0.5, 0.5, 0.2, 0.02), "fp16": (0.05, 0.05, 0.05, 0.02)}


def build(path, size):
    """The tiny tokenizer, filled up with words to the vocabulary of that size, so that every sampled id is a word."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
    from tokenizers import Tokenizer
    import sft
    hidden, inner, layers, heads, kv_heads, vocabulary = SIZES[size]
    tiny = sft.build_tiny("gp", 0)[1]
    words = json.loads(tiny.backend_tokenizer.to_str())
    words["model"]["vocab"] |= {f"word{i}": i for i in range(len(tiny), vocabulary)}
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), pad_token=tiny.pad_token,
                                  eos_token=tiny.eos_token, chat_template=tiny.chat_template)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=32768,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, bos_token_id=None), dtype=torch.bfloat16)
    model.save_pretrained(path)
    tok.save_pretrained(path)
    print(f"{path}: {model.num_parameters() / 1e9:.3f}e9 parameters")


def same(file, path, device, dtype):
    """Play 16 hands on the device, two attempts each. Compare the log-probabilities of what was said: generate()'s own,
    score()'s there, and score()'s on the CPU in fp32."""
    import torch
    import eval as ev
    args = SimpleNamespace(env="gp", rule="ood", seed=0, data=None, verify=2, vl=False, device=device, dtype=dtype)
    machine = ev.setup(args)
    model, tok = ev.load(path, machine.device, machine.frozen)
    torch.manual_seed(0)
    envs = [ev.make(args, rule="ood", split="train") for _ in range(16)]
    played = ev.rollout(model, tok, envs, [f"same/{i}" for i in range(16)], 1.0, 37, machine)
    rows = [s for e in played for s in e.segments]
    with torch.no_grad():
        there = ev.score(model, rows, tok.pad_token_id, machine)[0].cpu()
        prompts = [ev.Segment(s.ids[:s.action_mask.index(1)]) for s in rows]
        inputs, _ = ev.collate(prompts, tok.pad_token_id, machine.device, left=True)
        with machine.amp():
            out = model.generate(**inputs, generation_config=model.generation_config, max_new_tokens=37, do_sample=True,
                                 top_k=0, return_dict_in_generate=True, output_logits=True)
        width = inputs["input_ids"].shape[1]
        ends, sampled, again = set(model.generation_config.eos_token_id), [], []
        for i, (p, row) in enumerate(zip(prompts, out.sequences[:, width:].tolist())):
            stop = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            again.append(ev.Segment(p.ids))
            again[-1].add([], 0)
            again[-1].add(row[:stop], 1)
            sampled += [logits[i].float().log_softmax(-1)[token] for logits, token in zip(out.logits, row[:stop])]
        generated = (torch.stack(sampled) - ev.score(model, again, tok.pad_token_id, machine)[0]).abs().max().item()
        cpu = ev.setup(SimpleNamespace(device="cpu", dtype="fp32"))
        model, tok = ev.load(path)
        here = ev.score(model, rows, tok.pad_token_id, cpu)[0]
    write(file, {"dtype": dtype, "tokens": len(here), "generated": generated,
                 "devices": (there - here).abs().max().item(), "mean": (there - here).abs().mean().item()})


def allocated(device):
    """Bytes of all tensors that are held there."""
    import torch
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def measure(file, method, *flags):
    """Steps in the loops of sft.py or rl.py, without saving. Of PPO's seconds: playing; scoring, with advantages; updates."""
    import rl
    import sft
    from figures import state_bytes
    script, steps, moments = {"sft": sft, "rl": rl}[method], [], {}
    sft.EVERY["eval_episodes"] = 1
    script.save_checkpoint = lambda *_: None

    def clocked(name):
        function = getattr(script, name, None)

        def run(*args):
            result = function(*args)
            moments[name] = time.perf_counter()
            return result
        if function:
            setattr(script, name, run)

    def log(args, machine, record, text=""):
        if "tokens_per_s" in record:
            now = time.perf_counter()
            steps.append({"tokens_per_s": record["tokens_per_s"], "peak_gb": sft.peak_memory_gb(machine) * 2 ** 30 / 1e9,
                          "held_gb": allocated(machine.device) / 1e9, "dtype": str(machine.dtype)[6:]})
            if method == "rl":
                steps[-1].update(sampling=record["sampling_seconds"], scoring=moments["whiten"] - moments["rollout"],
                                 updating=now - moments["whiten"], updates=record["updates"],
                                 ratio_error=record["ratio_error"])
        plain_log(args, machine, record, text)
    plain_log, script.log = script.log, log
    for name in ("rollout", "whiten"):
        clocked(name)
    script.main(["--name", method, "--episodes", "0", "--evaluations", "1", *flags])
    with open(os.path.join(flags[flags.index("--out") + 1], "gp", "id", method, "metrics.jsonl")) as f:
        n = json.loads(f.readline())["n"]
    held, most = state_bytes(n, method == "rl")
    middle = {k: v if isinstance(v, str) else median(s[k] for s in steps[1:]) for k, v in steps[-1].items()}
    write(file, {"method": method, "n": n, **middle, "peak_gb": steps[-1]["peak_gb"], "formula_held_gb": held / 1e9,
                 "formula_most_gb": most / 1e9})


def spent(home):
    records = lines(os.path.join(home, "metrics.jsonl"))
    flops = [r["flops"] for r in records[1:] if "flops" in r]
    print(f"{(flops[-1] - flops[0]) / 6 / records[0]['n']:.0f}")


def curve(home, table, file):
    records = lines(os.path.join(home, "metrics.jsonl"))
    row = next(row for row in read(table)["rows"] if row["name"] == os.path.basename(home))
    records.append({"step": records[-1]["step"], "flops": records[-1]["flops"], **row})
    with open(file, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)


def write(file, content):
    with open(file, "w") as f:
        json.dump(content, f, indent=1)
    print(json.dumps(content))


def lines(file):
    with open(file) as f:
        return [json.loads(line) for line in f]


def read(file):
    with open(file) as f:
        return json.load(f)


def verdict(good, text):
    print(f"{'PASS' if good else 'FAIL'}  {text}")


def summary(files):
    def found(pattern):
        return sorted(glob.glob(os.path.join(files, pattern)))
    print("One model on this device and on the CPU in fp32: largest difference of a log-probability")
    for file in found("same-*.json"):
        r = read(file)
        generated, devices, *_ = BOUNDS[r["dtype"]]
        verdict(r["generated"] <= generated, f"{r['dtype']}: sampled against scored {r['generated']:.1e} (<= {generated:g})")
        verdict(r["devices"] <= devices, f"{r['dtype']}: this device against the CPU {r['devices']:.1e} (<= {devices:g}), "
                f"mean {r['mean']:.1e}, {r['tokens']} tokens")

    print("\nThe tiny jobs from nothing, against the CPU's in fp32. Cells: seen, ID, OOD")
    for file in found("tiny-*-table.json"):
        run = file.removesuffix("-table.json")
        _, env, device, dtype = os.path.basename(run).split("-")
        reference = os.path.join(files, f"tiny-{env}-cpu-fp32")
        name, rows = f"{env} {device} {dtype}", {row["name"]: row for row in read(file)["rows"]}
        iterations = [r for r in lines(run + "-rl.jsonl") if "ratio_error" in r]
        error = max(r["ratio_error"] for r in iterations)
        verdict(error <= BOUNDS[dtype][2], f"{name}: ratio_error {error:.1e} (<= {BOUNDS[dtype][2]:g}) in "
                f"{len(iterations)} iterations, {sum(r['sampling_seconds'] for r in iterations):.0f} s of sampling")
        if run == reference:
            print("      " + "; ".join(f"{row} " + ", ".join(f"{rows[row][c]['p']:.2f}" for c in ("seen", "id", "ood"))
                                       for row in rows))
            continue
        theirs = {row["name"]: row for row in read(reference + "-table.json")["rows"]}
        losses = [[r["loss"] for r in lines(f"{x}-base.jsonl") if "loss" in r][:10] for x in (reference, run)]
        drift = max(abs(b / a - 1) for a, b in zip(*losses))
        verdict(drift <= BOUNDS[dtype][3], f"{name}: loss of the base's first steps within {drift:.1e} (<= {BOUNDS[dtype][3]:g})")
        for row, cells in rows.items():
            check_cells(f"{name}: {row}", cells, theirs[row], SPREAD[env])
    for file in found("weights-*.json"):
        _, env, dtype = os.path.basename(file).removesuffix(".json").split("-")
        theirs = read(os.path.join(files, f"tiny-{env}-cpu-fp32-table.json"))["rows"][-1]
        check_cells(f"{env} {dtype}: the CPU's model played here", read(file)["rows"][-1], theirs, 0)

    print("\nSpeed and memory, random weights. GB: held between steps, at most; README's table says")
    for file in found("size-*.json"):
        r, name = read(file), os.path.basename(file).removesuffix(".json")
        text = (f"{name} ({r['n'] / 1e9:.3g}e9, {r['dtype']}): {r['held_gb']:.2f}, {r['peak_gb']:.1f} GB; "
                f"formula {r['formula_held_gb']:.2f}, {r['formula_most_gb']:.1f} without activations; "
                f"{r['tokens_per_s']:.0f} tokens/s")
        if r["method"] == "rl":
            text += (f"; seconds sampling {r['sampling']:.1f}, scoring {r['scoring']:.1f}, updates {r['updating']:.1f} "
                     f"({r['updates']:.0f}); ratio_error {r['ratio_error']:.1e}")
        else:
            text += f", {6 * r['n'] * r['tokens_per_s'] / 1e12:.1f} TFLOP/s"
        verdict(abs(r["held_gb"] / r["formula_held_gb"] - 1) < 0.05, text)

    for file in found("released-*-table.json"):
        print(f"\n{os.path.basename(file)}: success in % (legal first answers), seen, ID, OOD")
        for row in read(file)["rows"]:
            cells = [row[column] for column in ("seen", "id", "ood")]
            print(f"{row['name']:10}" + "".join(
                f" {100 * cell['p']:5.1f} ({100 - 100 * cell['verdicts'].get('illegal', 0):.0f})" for cell in cells))
    for file in found("failed.txt"):
        print("\nSteps that failed or ran out of time:")
        print(open(file).read(), end="")


def check_cells(name, mine, theirs, spread):
    """A row of the table and the same row elsewhere: no cell further apart than three standard errors."""
    pairs = [(mine[c], theirs[c]) for c in ("seen", "id", "ood")]
    worst = max(abs(a["p"] - b["p"]) / math.sqrt(a["se"] ** 2 + b["se"] ** 2 + 2 * spread ** 2 + 1e-6) for a, b in pairs)
    verdict(worst <= 3, f"{name} " + ", ".join(f"{a['p']:.2f} ({b['p']:.2f})" for a, b in pairs)
            + f": {worst:.1f} standard errors (<= 3)")


if __name__ == "__main__":
    {f.__name__: f for f in (build, same, measure, spent, curve, summary)}[sys.argv[1]](*sys.argv[2:])
