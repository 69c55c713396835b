#!/usr/bin/env bash
# Guess: LoRA leaves the base weights as they are, so with model.disable_adapter() a PEFT model is the base model, and
#   serves as the reference of a KL penalty. And a second adapter changes nothing for the first one.
# What happens: that hangs on init_lora_weights. "pissa" and "olora" take the strongest directions out of the base
#   weights and put them into the adapter. With the adapter the model is the base model until it is trained, so a test
#   of that passes. With disable_adapter() these directions are missing. add_adapter() with such a config takes the next
#   ones, and the first adapter's model is another one from then on. No warning comes.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Why it matters here: disable_adapter() is the usual way to a reference model without a second copy. The KL penalty of
#   an untrained policy is then nats, not 0, and pulls it to a broken model. trl 1.16 takes its reference so, and that
#   of an adapter that was trained before by add_adapter(), which breaks the policy. Keep a copy of the base model as
#   the reference, as this repository does, or use an init that leaves the base alone, and check that policy and
#   reference agree before the first update.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" -W ignore::FutureWarning - <<'PYTHON'
import copy
import peft, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2, initializer_range=0.2)).eval()
ids = torch.randint(64, (8, 20))

@torch.no_grad()
def logprobs(model):
    return model(ids).logits.log_softmax(-1)

def kl(p, q):
    return round((p.exp() * (p - q)).sum(-1).mean().item(), 4)

print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
wanted, seen = logprobs(base), {}
for init in (True, "gaussian", "orthogonal", "pissa", "olora"):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    policy = logprobs(model)
    with model.disable_adapter():
        reference = logprobs(model)
    model.add_adapter("second", config)
    seen[init] = kl(wanted, policy), kl(policy, reference), kl(policy, logprobs(model))
    print(f"{init!s:10} untrained: KL from the base model to the policy {abs(seen[init][0]):.3f}, from the policy to "
          f"its reference {abs(seen[init][1]):.3f}, to itself behind add_adapter() {abs(seen[init][2]):.3f}")
alone = all(max(map(abs, seen[init])) < 0.001 for init in (True, "gaussian"))
moved = all(abs(seen[init][0]) < 0.001 and min(seen[init][1:]) > 0.1 for init in ("pissa", "olora"))
raise SystemExit(0 if alone and moved else "the behaviour has changed")
PYTHON
