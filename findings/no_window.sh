#!/usr/bin/env bash
# Guess: mlx-lm computes what config.json describes. Where a model has a sliding window, and mlx-lm reads that entry for
#   some families, its layers look back no further than that.
# What happens: Gemma 3 has its windows. Mistral, Phi-3 and the windowed half of Gemma 2's layers look at the whole
#   text, without a word. Up to the window's length all log-probs agree with transformers; behind it they do not.
# Versions: mlx-lm 0.32.2, mlx 0.32.4 (its CPU build), transformers 5.24.0, torch 2.13.0.
# Why it matters here: Phi-3-mini has a window of 2,047 tokens, and a conversation with attempts and examples can be
#   longer. A short test shows equal log-probs, and the long conversations of the same run are another model's.
#   Compare log-probs on a text that is longer than the window.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
export HF_HUB_OFFLINE=1
cd "$folder" && venv/bin/python -W ignore - <<'PYTHON'
import mlx_lm, numpy, torch, transformers
import mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model

transformers.logging.disable_progress_bar()
WINDOW = 16
size = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=WINDOW)
ids = torch.randint(3, 64, (1, 60), generator=torch.Generator().manual_seed(0))
kinds = {"gemma3_text": dict(num_hidden_layers=6, head_dim=16, query_pre_attn_scalar=16),
         "gemma2": dict(num_hidden_layers=2, head_dim=16, query_pre_attn_scalar=16),
         "mistral": dict(num_hidden_layers=2, head_dim=16), "phi3": dict(num_hidden_layers=2)}

print("mlx-lm", mlx_lm.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
seen = {}
for kind, options in kinds.items():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **size, **options)).eval()
    for p in (p for p in model.parameters() if p.ndim == 2):
        torch.nn.init.normal_(p, std=0.15)
    model.save_pretrained("model")
    with torch.no_grad():
        ours = model(ids).logits[0].log_softmax(-1)
    theirs = load_model(Path("model"))[0](mx.array(ids.numpy().astype("int32")))
    off = (torch.tensor(numpy.array(theirs))[0].log_softmax(-1) - ours).abs().amax(-1)
    seen[kind] = [off[:WINDOW].max().item(), off[WINDOW:].max().item()]
    print(f"{kind}, window {WINDOW}: log-probs differ by up to {seen[kind][0]:.0e} within the window, "
          f"{seen[kind][1]:.0e} behind it")
kept = max(within for within, _ in seen.values()) < 1e-3 and seen["gemma3_text"][1] < 1e-3
kept = kept and min(behind for kind, (_, behind) in seen.items() if kind != "gemma3_text") > 0.5
raise SystemExit(0 if kept else "the behaviour has changed")
PYTHON
