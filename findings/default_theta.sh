#!/usr/bin/env bash
# Guess: a Llama that transformers 5 trained and saved is the same model for mlx-lm, which takes transformers folders
#   as they are. If it could not read a part of config.json that matters, it would raise.
# What happens: transformers 5 writes rope_theta and the scaling for long contexts into one entry, "rope_parameters".
#   mlx-lm reads it for some families (Qwen3). For others it looks for the former "rope_theta" and "rope_scaling" and,
#   where they are missing, takes the class's default without a word: 10,000 for a Llama, where Llama 3 has 500,000.
#   The weights are right and all positions wrong. Loading and saving is enough. Qwen2.5 is right by luck: mlx-lm's
#   default is the 1,000,000 that it has. Classes without a default (OLMo 3, Granite) raise.
# Versions: mlx-lm 0.32.2, mlx 0.32.4 (its CPU build), transformers 5.24.0, torch 2.13.0.
# Why it matters here: sft.py and rl.py save by transformers 5, and on a Mac mlx-lm is the usual way to run the result:
#   it then seems that training has destroyed the model. Add the two former entries to config.json, as below;
#   transformers takes them along. Compare log-probs before you believe a second reader.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
export HF_HUB_OFFLINE=1
cd "$folder" && venv/bin/python -W ignore - <<'PYTHON'
import json, mlx_lm, numpy, torch, transformers
import mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model

transformers.logging.disable_progress_bar()
size = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0)
ids = torch.randint(1, 64, (1, 60), generator=torch.Generator().manual_seed(0))

def difference(kind, former, theta, **scaling):
    """How far log-probs are off, read by transformers and by mlx-lm. former: with the entries of transformers 4."""
    rope = {"rope_type": "default", "rope_theta": theta, **scaling}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **size, rope_parameters=rope)).eval()
    for p in (p for p in model.parameters() if p.ndim == 2):
        torch.nn.init.normal_(p, std=0.15)
    model.save_pretrained("model")
    if former:
        config = json.loads(Path("model/config.json").read_text())
        config |= {"rope_theta": theta, "rope_scaling": rope if scaling else None}  # "rope_parameters" stays
        Path("model/config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).eval()
    with torch.no_grad():
        ours, reread = (m(ids).logits[0].log_softmax(-1) for m in (model, again))
    theirs = numpy.array(load_model(Path("model"))[0](mx.array(ids.numpy().astype("int32"))))
    return [(x - ours).abs().max().item() for x in (reread, torch.tensor(theirs)[0].log_softmax(-1))]

print("mlx-lm", mlx_lm.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
models = {"Llama, theta 10,000": ("llama", 1e4, {}), "Llama, theta 500,000": ("llama", 5e5, {}),
          "Llama, scaled": ("llama", 1e4, {"rope_type": "linear", "factor": 8.0}),
          "Qwen2, theta 1,000,000": ("qwen2", 1e6, {}), "Qwen3, theta 500,000": ("qwen3", 5e5, {})}
wrong = {}
for name, (kind, theta, scaling) in models.items():
    saved, former = (difference(kind, x, theta, **scaling) for x in (False, True))
    print(f"{name}: log-probs by mlx-lm differ by {saved[1]:.0e}, with the former entries by {former[1]:.0e}")
    assert max(saved[0], *former) < 1e-4  # transformers reads both, and mlx-lm the second
    wrong[name] = saved[1] > 0.5
kept = list(wrong.values()) == [False, True, True, False, False]
raise SystemExit(0 if kept else "the behaviour has changed")
PYTHON
