#!/usr/bin/env bash
# Guess: a finished conversation, put through the model's chat template, holds the token that ends its last turn.
# What happens: GLM-4.5 ends a turn with the mark of the next role. Behind the last answer there is no next role, so the
#   text ends with the answer's own last word. A model that is trained on it never sees the end of a last answer. The
#   earlier answers of the conversation do have an end.
# Versions: template glm4moe in the wheel of trl 1.16.0; transformers 5.24.0, Jinja2 3.1.6.
# Why it matters here: SFT on one demonstration per row would teach this model never to stop, and RL would pay for
#   answers of full length. Render a user turn behind the answer, and train on the first token behind the answer too.
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
first = render("glm4moe", ("user", "HAND"), ("assistant", "ANSWER"))
second = render("glm4moe", ("user", "HAND"), ("assistant", "ANSWER"), ("user", "FEEDBACK"))
other = render("qwen3", ("user", "HAND"), ("assistant", "ANSWER"))
for name, text in (("GLM-4.5, answer last", first), ("GLM-4.5, a turn behind", second), ("Qwen3, answer last", other)):
    print(f"{name:24} {text.partition('HAND')[2]!r}")
still = first.endswith("ANSWER") and "ANSWER<|user|>" in second and "ANSWER<|im_end|>" in other
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
