#!/usr/bin/env bash
# Guess: config.pad_token_id says which id fills up a batch. It may be the end token, which is learnt all the same.
# What happens: a model's input embedding takes the id as padding_idx when it is built, and that row gets no gradient.
#   Set later it has no effect in this process: tok.pad_token = tok.eos_token, and transformers' Trainer, which writes
#   the tokenizer's id into the config. save_pretrained() keeps it, and from_pretrained() builds the model with it. So
#   the end token's row is trained until the run stops, and frozen in the resumed run, without a warning. With tied
#   weights its gradient as an output is left.
# Versions: transformers 5.24.0, torch 2.13.0. Llama, Qwen2, Qwen3, Mistral, Gemma, SmolLM3; not GPT-2 and GPT-NeoX.
# Why it matters here: in a conversation of several attempts the end token is read between the turns. A resumed run is
#   another one than a whole run, and a model with such a config never trains that row. Give padding a token of its own,
#   as the tiny models here have, leave the config as it was, as sft.py does, or set
#   model.get_input_embeddings().padding_idx = None behind from_pretrained().
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - "$folder/saved" <<'PYTHON'
import sys
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM

END, ids = 2, torch.tensor([[5, 6, 7, 2, 8, 9, 2, 10, 11, 2]])  # three turns

def steps(model, count):
    """Plain SGD, which has no state to lose -> how far the end token's row of the input embedding moves."""
    row = model.get_input_embeddings().weight
    before = row[END].detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        sgd.zero_grad()
        model(ids, labels=ids).loss.backward()
        sgd.step()
    return (row[END] - before).norm().item()

def run(kind, resumed, tied=False, freed=False):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=END,
                                  pad_token_id=None, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    model.config.pad_token_id = END  # what Trainer does where tok.pad_token is tok.eos_token
    first = steps(model, 5)
    if resumed:
        model.save_pretrained(sys.argv[1])
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        if freed:
            model.get_input_embeddings().padding_idx = None
    return first, steps(model, 5), model.get_input_embeddings().weight[END]

transformers.logging.disable_progress_bar()
print("transformers", transformers.__version__, "torch", torch.__version__)
seen = {}
for kind, options in (("llama", {}), ("llama", {"tied": True}), ("llama", {"freed": True}), ("gpt_neox", {})):
    first, second, end = run(kind, False, **options)
    _, resumed, other = run(kind, True, **options)
    seen[kind, *options] = resumed == 0, torch.equal(end, other)
    print(f"{kind:8} {' '.join(options):5} the row moves by {first:.4f}, then {second:.4f}; resumed {resumed:.4f}")
still = list(seen.values()) == [(True, False), (False, False), (False, True), (False, True)]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
