#!/usr/bin/env bash
# Guess: think_format_reward pays 1 to an answer with a thought in <think> ... </think> and then text, of any model
#   that thinks, and 0 to any other.
# What happens: it reads the completion only, and wants it to BEGIN with <think>. Of many models the template has
#   written <think> at the end of the prompt: DeepSeek-R1's distills, Qwen3.5 to 3.8, Nemotron 3. All that they say in
#   the right form is paid 0. What is paid is a second <think> right behind the first one, a thought inside a thought.
#   With Qwen3, whose prompt ends before the mark, the reward does what its name says.
# Versions: rewards and templates in the wheel of trl 1.16.0; transformers 5.24.0, Jinja2 3.1.6.
# Why it matters here: a group of equal rewards gives no advantage, so at first the curve is flat at 0 and looks like a
#   model that cannot learn the form. If one sample ever opens a second thought, RL teaches that. Judge the last line of
#   the prompt together with the completion, and give a new reward one right and one wrong example in the tokens that
#   the model gets. verifier.py looks for the JSON alone.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 Jinja2==3.1.6
"$folder/venv/bin/pip" download -q --no-deps -d "$folder" trl==1.16.0
"$folder/venv/bin/python" -m zipfile -e "$folder"/trl-*.whl "$folder"
"$folder/venv/bin/python" - "$folder/trl" 2> >(grep -v "PyTorch was not found" >&2) <<'PYTHON'
import os, runpy, sys
import jinja2, transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), bos_token="<bos>")
judge = runpy.run_path(os.path.join(sys.argv[1], "rewards", "format_rewards.py"))["think_format_reward"]

def prompt(name):
    with open(os.path.join(sys.argv[1], "chat_templates", name + ".jinja"), encoding="utf-8") as f:
        return tok.apply_chat_template([{"role": "user", "content": "HAND"}], chat_template=f.read(), tokenize=False,
                                       add_generation_prompt=True, enable_thinking=True)

def paid(answer):
    return judge([[{"role": "assistant", "content": answer}]])[0]

print("transformers", transformers.__version__, "jinja2", jinja2.__version__, "templates and reward of trl 1.16.0")
seen = {}
for name in ("qwen3", "qwen3_5_think", "qwen3_8", "deepseek_r1_distill", "nemotron_3_nano"):
    end = prompt(name).partition("HAND")[2]
    opened = end.endswith("<think>\n")
    right = "6 * 4.\n</think>\n24" if opened else "<think>\n6 * 4.\n</think>\n24"
    seen[name] = opened, paid(right), paid("<think>\n" + right)
    print(f"{name:19} prompt ends {end[-16:]!r:20} one thought pays {seen[name][1]}, a second <think> {seen[name][2]}")
others = {seen[name] for name in seen if name != "qwen3"}
still = seen["qwen3"] == (False, 1.0, 0.0) and others == {(True, 0.0, 1.0)}
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
