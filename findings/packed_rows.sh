#!/usr/bin/env bash
# Guess: transformers keeps answers that are packed into one row apart where position_ids begin anew, with its default
#   attention too. A call that gives no mask and no cache needs no further option for that.
# What happens: that hangs on use_cache, which is True in most models' configs, in train mode as well. The model then
#   makes an empty cache, and where there is a cache no packed rows are looked for: the second answer reads the first.
#   Only use_cache=False keeps them apart, and only without an attention_mask: one of all ones undoes it. There is no
#   warning.
# Versions: transformers 5.24.0 with sdpa, its default attention, torch 2.13.0.
# Why it matters here: log-probabilities of all answers of a row but the first are wrong by nats, and a policy is
#   trained on answers that it did not give. Pass use_cache=False and no attention_mask, and compare a packed row with
#   its parts once; or pad, as this repository does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.2))
rows = [torch.randint(64, (1, 6)), torch.randint(64, (1, 9))]
packed, places = torch.cat(rows, 1), torch.cat([torch.arange(row.shape[1]) for row in rows])[None]

def logprobs(ids, **options):
    return model(ids, **options).logits.log_softmax(-1).detach()

ways = {"defaults": {}, "use_cache=False": {"use_cache": False},
        "use_cache=False, mask of ones": {"use_cache": False, "attention_mask": torch.ones_like(packed)}}
print("transformers", transformers.__version__, "torch", torch.__version__)
errors = {}
for training in (True, False):
    model.train(training)
    exact = torch.cat([logprobs(row) for row in rows], 1)
    for name, options in ways.items():
        error = (logprobs(packed, position_ids=places, **options) - exact).abs().amax(-1)[0]
        errors[name, training] = error[:6].max().item(), error[6:].max().item()
        print(f"{'train' if training else 'eval':5} {name:30} largest error of a log-probability: "
              "first answer {:.4f}, second {:.4f}".format(*errors[name, training]))
still = all(first < 1e-4 and (second < 1e-4 if name == "use_cache=False" else second > 0.1)
            for (name, _), (first, second) in errors.items())
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
