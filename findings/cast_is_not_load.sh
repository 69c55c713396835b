#!/usr/bin/env bash
# Guess: model.to(torch.bfloat16) and from_pretrained(..., dtype=torch.bfloat16) give the same model.
# What happens: the weights are equal bit for bit, and the models differ. The frequencies of the rotary embedding are a
#   buffer. from_pretrained() leaves them in float32, .to() rounds them to 8 bits, and the error of an angle grows with
#   the position: it is invisible in a short test, and 0.9 nats at position 3,000 of a random Llama.
#   Casting back with .float() does not bring the frequencies back.
# Versions: transformers 5.24.0, torch 2.13.0.
# Why it matters here: a reference that is a bf16 copy of the policy is another model than one loaded in bf16, and the
#   KL penalty would measure the difference. Load it with dtype=, or keep fp32 weights and use autocast.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0
"$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import copy, sys
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=4096, initializer_range=0.2)).eval()
model.save_pretrained(sys.argv[1])
loaded = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
cast = copy.deepcopy(model).to(torch.bfloat16)
ids, places = torch.randint(64, (1, 3000)), [10, 100, 1000, 2999]

@torch.no_grad()
def logprobs(model):
    return model(ids).logits.float().log_softmax(-1)[0, places]

exact = logprobs(model)
equal = all(torch.equal(a, b) for a, b in zip(loaded.parameters(), cast.parameters()))
found = {"loaded in bf16": logprobs(loaded), "cast to bf16": logprobs(cast),
         "loaded in bf16, then .float()": logprobs(loaded.float()),
         "cast to bf16, then .float()": logprobs(cast.float())}
errors = {name: (x - exact).abs().amax(-1) for name, x in found.items()}
print("transformers", transformers.__version__, "torch", torch.__version__)
print("weights equal bit for bit:", equal)
print(f"largest difference of a log-probability from float32, at positions {places}:")
for name, error in errors.items():
    print(f"  {name:30}", *(f"{e:.3f}" for e in error))
still = equal and errors["cast to bf16"][-1] > 5 * errors["loaded in bf16"][-1]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
