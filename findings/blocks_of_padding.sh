#!/usr/bin/env bash
# Guess: generate() of prompts of unequal length, padded on the left and with their attention_mask, answers each prompt
#   as it does alone. Most families do, those with sliding windows and linear attention as well.
# What happens: DeepSeek-V4 compresses each 4 and each 128 columns into one key. The blocks are counted from the first
#   column of the batch and not from the first token, and padding goes into them: the mask is used only for the window
#   of single tokens. So one token of padding changes the log-probs, and so does a padding of whole blocks. With its
#   sliding layers alone the model is as all others. Padding on the right does no harm to what stands before it, so
#   the log-probs of an answer that is scored are other ones than it was sampled from. There is no warning.
# Versions: transformers 5.24.0, torch 2.13.0.
# Why it matters here: TRL and this repository sample prompts in batches padded on the left. The text would depend on
#   the longest prompt of the batch, and PPO's ratios would be those of another distribution. check_model() in eval.py
#   refuses the model for that. With DeepSeek-V4 sample one prompt at a time, or prompts of one length.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
export HF_HUB_OFFLINE=1
cd "$folder" && venv/bin/python -W ignore - <<'PYTHON'
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
small = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
v4 = dict(num_key_value_heads=1, n_routed_experts=4, q_lora_rank=16, o_groups=2, o_lora_rank=8, index_n_heads=2,
          index_head_dim=8, moe_intermediate_size=32, num_experts_per_tok=2)
kinds = {"deepseek_v4": dict(v4, layer_types=["compressed_sparse_attention", "heavily_compressed_attention"]),
         "deepseek_v4, sliding layers": dict(v4, layer_types=["sliding_attention"] * 2),
         "gemma3_text": dict(num_key_value_heads=2, sliding_window=16),
         "qwen3_next": dict(num_key_value_heads=2, num_experts=4, shared_expert_intermediate_size=32,
                            layer_types=["linear_attention", "full_attention"], moe_intermediate_size=32,
                            num_experts_per_tok=2, **linear)}
prompt = torch.randint(3, 64, (1, 60), generator=torch.Generator().manual_seed(0))

def after(model, left, right=0):
    """Log-probs behind the prompt with so many tokens of padding to its left and right, by generate() or forward."""
    ids = torch.nn.functional.pad(prompt, (left, right))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (left, right))
    if right:
        return model(ids, attention_mask=mask).logits[0, 59].log_softmax(-1)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, output_logits=True,
                         return_dict_in_generate=True)
    return out.logits[0][0].log_softmax(-1)

print("transformers", transformers.__version__, "torch", torch.__version__)
changed = {}
for name, options in kinds.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split(",")[0], **small, **options)).eval()
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.ndim > 1):
            torch.nn.init.normal_(p, std=0.3)
        alone = after(model, 0)
        off = {pads: (after(model, *pads) - alone).abs().max().item() for pads in ((1, 0), (8, 0), (128, 0), (0, 8))}
    print(name, "- padding (left, right), change of log-probs:", *(f"{pads} {x:.0e}" for pads, x in off.items()))
    changed[name] = [x > 1e-3 for x in off.values()]
kept = list(changed.values()) == [[True, True, True, False]] + [[False] * 4] * 3
raise SystemExit(0 if kept else "the behaviour has changed")
PYTHON
