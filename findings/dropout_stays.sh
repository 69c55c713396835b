#!/usr/bin/env bash
# Guess: TRL's disable_dropout=True, the default of DPO, KTO and reward training and an option of GRPO, switches dropout
#   off in policy and reference, as its documentation says. So the first step of DPO has the loss log 2 = 0.6931: the
#   policy is still its reference.
# What happens: only modules of the class torch.nn.Dropout are set to 0. That was all of it in GPT-2. Most families
#   since then have dropout as a plain function: of the attention weights, where config.json has attention_dropout, and
#   in Seed-OSS, whose configuration has 0.1 by default, also of each block's outputs. That dropout stays on. No warning
#   comes, and the first loss is another one.
# Versions: trl 1.16.0, transformers 5.24.0, torch 2.13.0.
# Why it matters here: with dropout the ratio of PPO is not 1 before the first step, and a KL penalty measures noise.
#   rl.py leaves the policy in eval() for that reason. With TRL set the config's dropouts to 0 before the model is
#   built, and look at the first loss.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 trl==1.16.0
export HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_PROGRESS_BARS=1
cd "$folder" && venv/bin/python -W ignore - <<'PYTHON'
import math, torch, transformers, trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", "<end>", *"0123456789"])}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?", eos_token="<end>")
rows = Dataset.from_list([{"prompt": f"{i} 2 3 ", "chosen": "4 5 6 7", "rejected": "7 6 5 4"} for i in range(4)])

def first_loss(kind, disable_dropout, **options):
    """The first loss of DPO, of a random model that is its own reference."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        bos_token_id=None, eos_token_id=1, initializer_range=0.3, **options))
    model.save_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    args = trl.DPOConfig(output_dir="out", max_steps=1, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
                         bf16=False, report_to="none", disable_tqdm=True, disable_dropout=disable_dropout)
    trainer = trl.DPOTrainer(model, args=args, train_dataset=rows, processing_class=tok)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]["loss"]

print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
small = dict(num_key_value_heads=2, intermediate_size=64, head_dim=16)
off = {}
for name, kind, options in (("GPT-2", "gpt2", {}), ("Llama", "llama", small), ("Seed-OSS", "seed_oss", small),
                            ("Llama, attention_dropout 0.1", "llama", {**small, "attention_dropout": 0.1})):
    losses = [first_loss(kind, disable, **options) for disable in (True, False)]
    print(f"{name}: first loss {losses[0]:.4f}, with disable_dropout=False {losses[1]:.4f}")
    off[name] = [abs(loss - math.log(2)) < 1e-4 for loss in losses]
kept = list(off.values()) == [[True, False], [True, True], [False, False], [False, False]]
raise SystemExit(0 if kept else "the behaviour has changed")
PYTHON
