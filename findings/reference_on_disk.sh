#!/usr/bin/env bash
# Guess: without a ref_model, TRL's DPOTrainer measures against the model it was given, in the state it had before the
#   first step. So its docstring has it, too. GRPOTrainer with beta > 0 does the same for its KL penalty.
# What happens: the reference is not copied from the model. It is loaded anew from where the model was once loaded from,
#   config._name_or_path. Weights that were trained in this process are not there, so SFT and then DPO or GRPO in one
#   script has the model BEFORE the SFT as its reference. save_pretrained() in between does not change the path. There
#   is no warning: the two models have the same shapes.
# Versions: trl 1.16.0, transformers 5.24.0, torch 2.13.0. Full fine-tuning, without PEFT.
# Why it matters here: SFT and RL in one script is the whole plan of this project. The KL penalty pulls back to the
#   model that cannot do the task yet, DPO starts with a margin that it did not earn, and both look like a usual run.
#   Save the model and load it from its new folder, or give DPOTrainer a ref_model; GRPOTrainer takes none. In the first
#   step DPO's loss must be log 2, its margin 0 and GRPO's kl 0. rl.py loads policy and reference from one folder.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 trl==1.16.0
export HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_PROGRESS_BARS=1
cd "$folder" && venv/bin/python -W ignore - <<'PYTHON'
import copy, math
import torch, transformers, trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", "<end>", *"0123456789"])}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?", eos_token="<end>")
prompts, answers, pairs = (Dataset.from_list([{"prompt": "4 6", **more}] * 8) for more in (
    {}, {"completion": " 2 4"}, {"chosen": " 2 4", "rejected": " 1 0"}))

def train(name, model, rows, steps, options={}, **more):
    args = getattr(trl, f"{name}Config")(
        output_dir="out", max_steps=steps, learning_rate=1e-2, logging_steps=1, save_strategy="no", use_cpu=True,
        bf16=False, report_to="none", disable_tqdm=True, log_level="error", seed=0, **options)
    trainer = getattr(trl, f"{name}Trainer")(model, args=args, train_dataset=rows, processing_class=tok, **more)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.state.log_history, getattr(trainer, "ref_model", None)

torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
    eos_token_id=1, bos_token_id=None)).save_pretrained("base")
model = AutoModelForCausalLM.from_pretrained("base")
before = model.lm_head.weight.detach().clone()
train("SFT", model, answers, 30)
model.save_pretrained("sft")
print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
rl, seen = {"options": dict(beta=0.1, num_generations=4, max_completion_length=4),
            "reward_funcs": lambda completions, **_: [0.0, 1.0] * 4}, []
for name in ("as it is", "with a ref_model", "loaded anew"):
    policy = AutoModelForCausalLM.from_pretrained("sft") if name == "loaded anew" else copy.deepcopy(model)
    more = {"ref_model": model} if name == "with a ref_model" else {}
    (log, *_), ref = train("DPO", copy.deepcopy(policy), pairs, 1, **more)
    kl = 0 if more else train("GRPO", policy, prompts, 1, **rl)[0][0]["kl"]
    seen.append([torch.equal(ref.lm_head.weight, before), abs(log["loss"] - math.log(2)) > 0.1, kl > 0.1])
    print(f"model after SFT, {name:16} DPO's first loss {log['loss']:.4f}, margin {log['rewards/margins']:.4f};",
          f"GRPO's first kl {'-' if more else round(kl, 4)}; reference is the model before SFT: {seen[-1][0]}")
raise SystemExit(0 if seen == [[True] * 3, [False] * 3, [False] * 3] else "the behaviour has changed")
PYTHON
