#!/usr/bin/env bash
# Guess: generate(num_beams=3) gives the same answers with and without a cache: when a beam is dropped and another one
#   doubled, the cache's rows follow. A model whose cache cannot do that is refused, as RWKV is.
# What happens: MiniMax (Text-01, M1) has layers of linear attention beside the usual ones, and keeps their state apart
#   in its cache. generate() reorders only the usual layers, so a beam goes on with another beam's memory of the text.
#   Nothing is said. One beam, and sampling, are right, and so are other models with linear attention (Qwen3-Next).
# Versions: transformers 5.24.0, torch 2.13.0.
# Why it matters here: beams are a common way to look for a best answer, and their sum of log-probs is compared with
#   that of sampled answers. Both are wrong here, and the answers still look like text. Score what generate() found by
#   a forward pass, as below, or give use_cache=False.
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
             num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
kinds = {"minimax": dict(num_local_experts=4, layer_types=["linear_attention", "full_attention"]),
         "qwen3_next": {**experts, **linear, "layer_types": ["linear_attention", "full_attention"]},
         "llama": {}}
prompts = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))

def difference(kind, beams, **options):
    """-> share of the tokens that are alike with and without the cache; how far generate()'s mean log-prob is off."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **options)).eval()
    for p in (p for p in model.parameters() if p.ndim > 1):
        torch.nn.init.normal_(p, std=0.2)
    answers = []
    for use_cache in (True, False):
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), num_beams=beams, do_sample=False,
                             max_new_tokens=20, min_new_tokens=20, use_cache=use_cache, output_scores=True,
                             return_dict_in_generate=True, length_penalty=0.0)
        answers.append(out.sequences)
        with torch.no_grad():
            logp = model(out.sequences, use_cache=False).logits.log_softmax(-1)[:, 11:-1]
        total = logp.gather(-1, out.sequences[:, 12:, None]).sum((1, 2))
        if use_cache and beams > 1:
            off = (out.sequences_scores - total).abs().max().item()
    return (answers[0] == answers[1])[:, 12:].float().mean().item(), off if beams > 1 else 0.0

print("transformers", transformers.__version__, "torch", torch.__version__)
seen = {}
for kind, options in kinds.items():
    for beams in (1, 3):
        alike, off = seen[kind, beams] = difference(kind, beams, **options)
        print(f"{kind}, beams {beams}: {alike:.0%} of the tokens as without a cache; log-prob off by up to {off:.1e}")
wrong = [key for key, (alike, off) in seen.items() if alike < 1]
raise SystemExit(0 if wrong == [("minimax", 3)] and seen["minimax", 3][1] > 0.1 else "the behaviour has changed")
PYTHON
