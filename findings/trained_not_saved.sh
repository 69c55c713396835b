#!/usr/bin/env bash
# Guess: a model that from_pretrained() loads, and that trains, can be written by save_pretrained().
# What happens: with "output_attentions": true in its config.json a model loads, trains and generates, and
#   save_pretrained() raises: that setting needs attn_implementation="eager", and sdpa is the default. Set on a model's
#   config it raises at once. From a file it comes past that check, with one warning, about generation, and the next
#   check is in save_pretrained(), when the training is over. Trainer, too, fails at its first checkpoint.
# Versions: transformers 5.24.0, torch 2.13.0, accelerate 1.15.0.
# Why it matters here: the setting is left in a folder by whoever looked at attention maps, under a transformers that
#   did not check it. Hours of training end without a file. Set config.output_attentions = False after loading, and
#   save once before you train. eval.py's load() does the first.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import json, os, sys
from importlib.metadata import version
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

folder = sys.argv[1]
tiny = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)

def outcome(what, action):
    """-> did the action raise? Prints the last line of what it says."""
    try:
        action()
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {str(error).splitlines()[-1].strip()[:99]}")
        return True
    print(f"{what}: fine")
    return False

print(*(f"{name} {version(name)}" for name in ("transformers", "torch", "accelerate")))
LlamaForCausalLM(LlamaConfig(**tiny)).save_pretrained(f"{folder}/model")
with open(f"{folder}/model/config.json") as f:
    config = json.load(f)
with open(f"{folder}/model/config.json", "w") as f:
    json.dump({**config, "output_attentions": True}, f)

model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
ids = torch.arange(12).reshape(2, 6)
rows = [{"input_ids": row, "labels": row} for row in ids]
trainer = Trainer(model, TrainingArguments(f"{folder}/run", max_steps=2, save_steps=2, use_cpu=True, report_to=[],
                                           disable_tqdm=True), train_dataset=rows)
seen = [outcome("the setting on a model's config", lambda: setattr(
            LlamaForCausalLM(LlamaConfig(**tiny)).config, "output_attentions", True)),
        outcome("a gradient", lambda: model(ids, labels=ids).loss.backward()),
        outcome("generate()", lambda: model.generate(ids, max_new_tokens=3)),
        outcome("save_pretrained()", lambda: model.save_pretrained(f"{folder}/again")),
        outcome("Trainer, which saves after step 2", trainer.train)]
model.config.output_attentions = False
seen.append(outcome("save_pretrained() with the setting off", lambda: model.save_pretrained(f"{folder}/again")))
raise SystemExit(0 if seen == [True, False, False, True, True, False] else f"the behaviour has changed: {seen}")
PYTHON
