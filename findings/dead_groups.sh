#!/usr/bin/env bash
# Guess: GRPOTrainer logs as frac_reward_zero_std which share of the questions had answers of equal reward, all right or
#   all wrong. Such a group has advantages of 0 and teaches nothing, whatever the rewards are divided by.
# What happens: what is compared with 0 is the number that the advantages are divided by. With scale_rewards="batch"
#   that is the deviation of the WHOLE batch, and with multi_objective_aggregation="normalize_then_sum" the deviation of
#   all normalised rewards. So a step logs 0 or 1 and nothing else: 0 if one group lives, and with "batch" also where
#   every group is dead, some right and some wrong. "group", the default, and "none" count groups. No warning comes.
# Versions: trl 1.16.0, transformers 5.24.0, torch 2.13.0.
# Why it matters here: the share of dead groups says whether the questions are too easy or too hard, and how much of
#   each batch is wasted. A sweep over scale_rewards shows it fall from 3 in 4 to nothing, on the same rewards. Count
#   it from the rewards, as below, before comparing two runs.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 trl==1.16.0
export HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_PROGRESS_BARS=1
cd "$folder" && venv/bin/python -W ignore - <<'PYTHON'
import torch, transformers, trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", "<end>", *"0123456789"])}, unk_token="?"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?", eos_token="<end>")

class Watched(trl.GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.advantages = batch["advantages"].view(4, 4)  # four questions, four answers to each
        return batch

def first_step(rewards, options):
    """frac_reward_zero_std of one step whose answers get these rewards, and the share of groups without advantages."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None))
    args = trl.GRPOConfig(
        output_dir="out", max_steps=1, num_generations=4, per_device_train_batch_size=16, max_completion_length=4,
        logging_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, log_level="error", **options)
    trainer = Watched(model, args=args, train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(4)]),
                      reward_funcs=lambda completions, **_: rewards, processing_class=tok)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    dead = (trainer.advantages.abs().amax(1) < 1e-6).float().mean().item()
    return trainer.state.log_history[0]["frac_reward_zero_std"], dead

print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
batches = {"none dead": [1, 0, 0, 0] * 4, "3 of 4 dead": [1] * 4 + [0] * 4 + [1] * 4 + [1, 0, 0, 0],
           "all dead": [1] * 8 + [0] * 8}
seen = {}
for kind in ("group", "none", "batch", "normalize_then_sum"):
    key = "multi_objective_aggregation" if kind == "normalize_then_sum" else "scale_rewards"
    seen[kind] = [first_step(rewards, {key: kind}) for rewards in batches.values()]
    print(f"{kind:18}", "; ".join(f"{name}: logged {logged}, counted {dead}"
                                  for name, (logged, dead) in zip(batches, seen[kind])))
right, batch, sum_ = ([(0, 0), (x, 0.75), (y, 1)] for x, y in ((0.75, 1), (0, 0), (0, 1)))
raise SystemExit(0 if list(seen.values()) == [right, right, batch, sum_] else "the behaviour has changed")
PYTHON
