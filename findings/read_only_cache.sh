#!/usr/bin/env bash
# Guess: model(answer, cache=cache, use_cache=False) reads the cache of a prompt and leaves it as it was. So the answers
#   to one prompt can be scored one after another, and the prompt is read once.
# What happens: use_cache=False only says that no cache is made where none was given. One that was given grows with
#   every call, so the second answer is scored behind prompt AND first answer. No error or warning comes.
# Versions: transformers 5.24.0, torch 2.13.0.
# Why it matters here: log-probabilities of all answers but the first are wrong by nats, and hang on the answers' order.
#   A best answer of several, or PPO's ratio, would be taken from them. Give each call copy.deepcopy(cache), or cut the
#   cache back by cache.crop(-length of the answer) behind each call. This repository scores without a cache.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.2)).eval()
prompt, answers = torch.randint(64, (1, 8)), [torch.randint(64, (1, 3)) for _ in range(3)]

@torch.no_grad()
def second_token(answer, cache):
    """Log-probabilities behind an answer's first token."""
    return model(answer, cache=cache, use_cache=False).logits[0, 0].log_softmax(-1)

with torch.no_grad():
    exact = [model(torch.cat([prompt, a], 1), use_cache=False).logits[0, 8].log_softmax(-1) for a in answers]
    cache = model(prompt, use_cache=True).cache
    copies = [copy.deepcopy(cache) for _ in answers]
print("transformers", transformers.__version__, "torch", torch.__version__)
errors = {"one cache": [], "a copy for each": []}
for answer, truth, own in zip(answers, exact, copies):
    for (name, found), given in zip(errors.items(), (cache, own)):
        before = given.get_seq_length()
        found.append((second_token(answer, given) - truth).abs().max().item())
        print(f"{name:16} tokens in the cache: {before:2} before, {given.get_seq_length():2} after use_cache=False; "
              f"largest error of a log-probability {found[-1]:.4f}")
still = (cache.get_seq_length() == 17 and errors["one cache"][0] < 1e-4 < 0.1 < min(errors["one cache"][1:])
         and max(errors["a copy for each"]) < 1e-4)
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
