#!/usr/bin/env bash
# Guess: LoraConfig(target_modules="all-linear") adapts all linear layers of a model but the output layer, and the names
#   gate_proj, up_proj, down_proj adapt the MLPs, in a mixture of experts those of the experts: most of its weights.
# What happens: transformers 5 keeps the experts of a layer as one tensor, and not as linear layers. PEFT knows that for
#   some families and adapts the tensor: Qwen3-MoE, OLMoE, GLM-4.5, DeepSeek-V3. For others, Qwen2-MoE and gpt-oss,
#   the same configuration adapts no expert at all. There is no error and no warning, since attention and a shared
#   expert do match, and the loss falls. On disk Qwen2-MoE's experts are named as those of Qwen3-MoE are.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Why it matters here: "LoRA forgets less than full fine-tuning" is a claim about which weights can move, and a
#   comparison of two models then compares two kinds of training. Count the adapted parameters among the experts, as
#   below, and name the tensors in target_parameters where there are none.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
export HF_HUB_OFFLINE=1
cd "$folder" && venv/bin/python - 2> log <<'PYTHON' || { cat log; exit 1; }
import warnings
import peft, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
small = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
experts = dict(num_experts=4, moe_intermediate_size=32)
kinds = {"qwen3_moe": experts, "olmoe": dict(num_experts=4),
         "qwen2_moe": {**experts, "shared_expert_intermediate_size": 32}, "gpt_oss": dict(num_local_experts=4)}
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

def adapted(kind, **targets):
    """-> (share of the weights that are experts', LoRA's parameters in experts, and elsewhere, what was warned of)."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**small, **kinds[kind]}))
    sizes = [(".experts." in name, p.numel()) for name, p in model.named_parameters() if ".layers." in name]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, **targets))
    lora = [(".experts." in name, p.numel()) for name, p in tuned.named_parameters() if "lora_" in name]
    share = sum(n for inside, n in sizes if inside) / sum(n for _, n in sizes)
    about = [str(w.message) for w in warned if "expert" in str(w.message) or "target" in str(w.message)]
    return share, sum(n for inside, n in lora if inside), sum(n for inside, n in lora if not inside), about

print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
inside = {}
for kind in kinds:
    tensors = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    for way, targets in {"all-linear": dict(target_modules="all-linear"), "names": dict(target_modules=names),
                         "tensors": dict(target_modules=["q_proj"], target_parameters=tensors)}.items():
        share, inside[kind, way], outside, about = adapted(kind, **targets)
        print(f"{kind}, {way}: LoRA has {inside[kind, way]} parameters in the experts, which are {share:.0%} of the "
              f"blocks' weights, and {outside} elsewhere; warnings: {len(about)}")
left_out = [key for key, n in inside.items() if not n]
print(left_out)
raise SystemExit(0 if left_out == [(k, w) for k in ("qwen2_moe", "gpt_oss") for w in ("all-linear", "names")]
                 else "the behaviour has changed")
PYTHON
