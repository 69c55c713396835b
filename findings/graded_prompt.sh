#!/usr/bin/env bash
# Guess: torchrl's CountdownEnv pays an answer alike whether the policy is given a history, a text or tokens. input_mode
#   says how the question is passed on, and what is judged is the answer.
# What happens: with "history" the reward reads the last message. With "text" and "tokens" it reads prompt and answer as
#   one text, and takes the first <answer> tag in it. That is the one of the environment's own system prompt, which says
#   that an answer stands within "<answer></answer>" and so holds an empty one. So no answer is ever found: a right one
#   is paid 0, as is one without tags. There is no warning, and the episode counts as over. The prompts of
#   GSM8KEnv and MATHEnv have the same empty tags, and their rewards read the same text.
# Versions: torchrl 0.14.1, tensordict 0.14.3, transformers 5.24.0, torch 2.13.0.
# Why it matters here: it is the game of this repository's first task. A reward of 0 for all answers is what a run looks
#   like whose model is too weak, and GRPO then has advantages of 0. Use input_mode="history", and pay a known right
#   answer once before a run.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 tensordict==0.14.3 torchrl==0.14.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchrl.data.llm import History
from torchrl.envs.llm.datasets.countdown import CountdownEnv
from transformers import PreTrainedTokenizerFast

letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
letter_by_letter = Tokenizer(models.BPE(letters, []))
letter_by_letter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
letter_by_letter.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letter_by_letter, eos_token="<|im_end|>")
tokenizer.chat_template = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

def pay(mode, answer):
    """One question, one answer -> reward and success. full is prompt and answer, as the policy wrappers write it."""
    env = CountdownEnv(seed=0, num_count=2, input_mode=mode, tokenizer=tokenizer)
    step = env.reset()
    said, prompt = step[mode], step[mode].prompt
    if mode == "history":
        said.response = History(role=[["assistant"]], content=[[answer]], batch_size=(1, 1))
        said.full = prompt.extend(said.response, inplace=False, dim=-1)
    elif mode == "text":
        said.response, said.full = [answer], [prompt[0] + answer]
    else:
        said.response = tokenizer(answer, return_tensors="pt").input_ids
        said.full = torch.cat([prompt, said.response], -1)
    after = env.step(step)["next"]
    return after["answer"][0], round(after["reward"].item(), 2), after["success"].item(), after["done"].item()

print(*(f"{name} {version(name)}" for name in ("torchrl", "tensordict", "transformers", "torch")))
answers = ("<think>A sum.</think><answer>50+98</answer>", "<think>A sum.</think><answer>50</answer>", "50+98")
seen = {(mode, answer): pay(mode, answer) for mode in ("history", "text", "tokens") for answer in answers}
for (mode, answer), (truth, reward, success, done) in seen.items():
    print(f"{mode:7} {truth}: {answer:43} reward {reward}, success {success}, done {done}")
paid = {mode: [seen[mode, answer][1] for answer in answers] for mode in ("history", "text", "tokens")}
still = paid == {"history": [1.0, 0.1, 0.0], "text": [0.0] * 3, "tokens": [0.0] * 3}
raise SystemExit(0 if still else f"the behaviour has changed: {paid}")
PYTHON
