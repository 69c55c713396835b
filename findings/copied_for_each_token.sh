#!/usr/bin/env bash
# Guess: the cache of generate() grows as a Python list does. A new token costs its own keys and values, so an answer of
#   twice as many tokens costs twice as much memory traffic for the cache.
# What happens: DynamicCache, which every generate() takes by default, joins old and new by torch.cat() in each layer
#   and step, so each token copies the keys and values of all tokens before it. Twice as many tokens copy four times as
#   much: behind a prompt of 50 tokens, 400 tokens copy 250 times what they add. On two CPU cores that was 63% of the
#   time of 500 tokens for 16 rows (hidden 512, 8 layers). cache_implementation="static" copies nothing, but attends
#   to all of its room from the first step on.
# Versions: transformers 5.24.0, torch 2.13.0.
# Why it matters here: sampling is up to half of the time of reinforcement learning on a CPU, and long answers look slow
#   because "attention is quadratic" when it is the copying. A cache layer with room at its end writes in place, gives
#   the same tokens, and takes a dozen lines: BufferedLayer in eval.py.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

PROMPT, ROWS, HEADS, LAYERS, WIDTH = 50, 4, 4, 2, 16

class Copied(TorchDispatchMode):
    """Counts the numbers that torch.cat() joins along the tokens of keys or values, [rows, heads, tokens, width]."""
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.cat.default and result.ndim == 4 and args[1:] == (-2,):
            self.numbers += result.numel()
        return result

def copied(tokens, cache):
    """-> what the steps behind the prompt copied, as a multiple of the keys and values that they added."""
    config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
                              cache_implementation=cache, disable_compile=True)
    with Copied() as counter:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    each = 2 * LAYERS * ROWS * HEADS * WIDTH  # the numbers of one token, keys and values
    copies = max(0, counter.numbers - PROMPT * each)  # the prompt's own step is no copy
    times = copies / (each * (tokens - 1))
    print(f"{cache or 'default':8} {tokens:4} tokens: copied {times:6.1f} times what is new")
    return times

print("transformers", version("transformers"), "torch", version("torch"))
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=HEADS * WIDTH, intermediate_size=64, num_hidden_layers=LAYERS,
                                     num_attention_heads=HEADS, num_key_value_heads=HEADS, vocab_size=99)).eval()
prompt = torch.randint(3, 99, (ROWS, PROMPT))
seen = [copied(tokens, cache) for cache in (None, "static") for tokens in (100, 200, 400)]
raise SystemExit(0 if seen == [100, 150, 250, 0, 0, 0] else f"the behaviour has changed: {seen}")
PYTHON
