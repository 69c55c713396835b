#!/usr/bin/env bash
# Guess: continue_final_message=True ends the prompt with exactly what the assistant has said so far, behind its header.
#   So an answer that was cut off inside its thought can go on.
# What happens: Qwen3's template finds no </think> in the unfinished answer, takes it for one without a thought, and
#   writes an empty, closed thought in front of it. The model then reads a second <think> behind a finished thought:
#   a state that it was never in. The text does end as expected, so looking at its end shows nothing. Qwen3.6 and
#   GLM-4.5 do the same; Nemotron 3 Nano does not.
# Versions: templates in the wheel of trl 1.16.0; transformers 5.24.0, Jinja2 3.1.6.
# Why it matters here: to go on after --max_new_tokens, or to score a partial answer, keep the token ids that were
#   sampled. A trip through text and template makes another prompt, and PPO's ratio would compare two states.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 Jinja2==3.1.6
"$folder/venv/bin/pip" download -q --no-deps -d "$folder" trl==1.16.0
"$folder/venv/bin/python" -m zipfile -e "$folder"/trl-*.whl "$folder"
"$folder/venv/bin/python" - "$folder/trl/chat_templates" 2> >(grep -v "PyTorch was not found" >&2) <<'PYTHON'
import os, sys
import jinja2, transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), bos_token="<bos>")

def render(name, *turns, **options):
    """The text of (role, content) turns in the words of a released template."""
    with open(os.path.join(sys.argv[1], name + ".jinja"), encoding="utf-8") as f:
        return tok.apply_chat_template([{"role": role, "content": content} for role, content in turns],
                                       chat_template=f.read(), tokenize=False, **options)

print("transformers", transformers.__version__, "jinja2", jinja2.__version__, "templates of trl 1.16.0")
cut_off = "<think>\nFour cards:"
seen = {}
for name in ("qwen3", "qwen3_6", "glm4moe", "nemotron_3_nano"):
    text = render(name, ("user", "HAND"), ("assistant", cut_off), continue_final_message=True)
    seen[name] = text.count("<think>"), text.endswith(cut_off)
    print(f"{name:16} {text.partition('HAND')[2]!r}")
still = list(seen.values()) == [(2, True), (2, True), (2, True), (1, True)]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
