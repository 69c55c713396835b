#!/usr/bin/env bash
# Guess: content may be a string or a list of parts, [{"type": "text", "text": "HAND"}], as chat APIs and models with
#   pictures write it. A template for text alone joins the parts, or refuses them.
# What happens: Qwen3's template takes any content that is no string for an empty one: the turn is rendered without a
#   word of it, users' and assistants' turns alike. Llama 3's and 3.1's, Gemma 1's and Nemotron 3's write the Python list
#   into the prompt, with its brackets and 'type'. Of those below only Qwen2.5's and Phi-3's refuse, and Qwen3.6's and
#   GLM-4.5's join. The templates get the list as it is: transformers changes nothing about it.
# Versions: templates in the wheel of trl 1.16.0; transformers 5.24.0, Jinja2 3.1.6.
# Why it matters here: a set that serves models with and without pictures has parts. Qwen3 would be asked nothing, and
#   trained to say nothing; its loss falls quickly, as all demonstrations are one empty turn. Llama learns to answer in
#   Python lists. The same set is right with the next family. Join the texts to a string before a template for text
#   sees them, and look for a word of the question in one rendered prompt.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile transformers==5.24.0 Jinja2==3.1.6
"$folder/venv/bin/pip" download -q --no-deps -d "$folder" trl==1.16.0
"$folder/venv/bin/python" -m zipfile -e "$folder"/trl-*.whl "$folder"
"$folder/venv/bin/python" - "$folder/trl/chat_templates" 2> >(grep -v "PyTorch was not found" >&2) <<'PYTHON'
import os, sys
import jinja2, transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), bos_token="<bos>")

def render(name, *contents):
    """The text of a user's and an assistant's turn in the words of a released template."""
    with open(os.path.join(sys.argv[1], name + ".jinja"), encoding="utf-8") as f:
        return tok.apply_chat_template([{"role": role, "content": content} for role, content in
                                        zip(("user", "assistant"), contents)], chat_template=f.read(), tokenize=False)

def kind(name):
    words = render(name, "HAND", "ANSWER")
    try:
        text = render(name, *([{"type": "text", "text": word}] for word in ("HAND", "ANSWER")))
    except (TypeError, jinja2.TemplateError) as e:
        return "refused", str(e)
    if "HAND" not in text and "ANSWER" not in text:
        return "lost", text
    return "as strings" if text == words else "Python" if "'type'" in text else "another", text

print("transformers", transformers.__version__, "jinja2", jinja2.__version__, "templates of trl 1.16.0")
seen = {}
for name in ("qwen3", "qwen3_instruct_2507", "llama3", "llama3_1", "gemma", "nemotron_3_nano", "qwen2_5", "phi3",
             "qwen3_6", "glm4moe"):
    seen[name], text = kind(name)
    print(f"{name:20} {seen[name]:10} {text[-150:]!r}")
still = list(seen.values()) == ["lost"] * 2 + ["Python"] * 4 + ["refused"] * 2 + ["as strings"] * 2
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
