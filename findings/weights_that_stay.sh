#!/usr/bin/env bash
# Guess: in a sweep over the mix of two adapters each add_weighted_adapter(adapters, weights, "mix") makes the mix anew,
#   or raises since there is an adapter of that name.
# What happens: if the name is taken it returns at once, before it looks at weights, adapters or method. So the whole
#   sweep is measured on the first mix, and set_adapter("mix") does what it says. There is no error, no warning, and no
#   return value to tell. Its neighbour add_adapter() does raise for a taken name. The documentation does not say it.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Why it matters here: the mix of an SFT adapter and an RL adapter is the usual picture of what each has learnt: ID and
#   OOD success over the weight. A flat line is a believable result, and is what comes out. Call delete_adapter("mix")
#   in between, or give each mix a name of its own, and check that the weights 0 and 1 give the two adapters back.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
import peft, torch, transformers
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("error")
torch.manual_seed(0)

def config():
    return LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)

model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config(), adapter_name="sft")
model.add_adapter("rl", config())
x = torch.randn(8, 16)

@torch.no_grad()
def output(name):
    model.set_adapter(name)
    return model(x)

def sweep(method, anew):
    """How far the mix is from the mean of the two adapters' outputs with the same weights, for five weights."""
    errors = []
    for w in (0, .25, .5, .75, 1):
        model.add_weighted_adapter(["sft", "rl"], [1 - w, w], "mix", combination_type=method, svd_rank=8)
        mixed = output("mix")
        wanted = (1 - w) * output("sft") + w * output("rl")
        errors.append(round((mixed - wanted).abs().max().item(), 2))
        if anew or w == 1:
            model.delete_adapter("mix")
    return errors

try:
    model.add_adapter("rl", config())
    raises = False
except ValueError as error:
    raises = print("add_adapter():", error) is None
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("largest error of the output, for the weights 0, .25, .5, .75 and 1 of the second adapter")
seen = {(method, anew): sweep(method, anew) for method in ("cat", "svd") for anew in (False, True)}
for (method, anew), errors in seen.items():
    print(f"{method} {'deleted in between' if anew else 'the same name':18} {errors}")
still = all(max(x) < .01 if anew else x[0] < .01 and x == sorted(x) and x[1] > .1 for (_, anew), x in seen.items())
raise SystemExit(0 if still and raises else "the behaviour has changed")
PYTHON
