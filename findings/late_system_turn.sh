#!/usr/bin/env bash
# Guess: a second system turn, late in a conversation, stands where it was said, or the template refuses it.
# What happens: that hangs on the family. DeepSeek-R1's distills put it in front of the whole conversation IN THE PLACE
#   of the first system turn, DeepSeek-V3 behind the first one. gpt-oss and Qwen3-VL drop it without a word. Qwen3.5
#   refuses. Of these five none keeps it where it was said; Llama 3.1 and Qwen2.5 do.
# Versions: templates in the wheel of trl 1.16.0; transformers 5.24.0, Jinja2 3.1.6.
# Why it matters here: a verifier's words are a natural system turn. In two of these families the model would never read
#   them, and in two they change the first tokens, so no cache and no earlier token holds. Feedback is a user turn here.
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
turns = [("system", "RULE"), ("user", "HAND"), ("assistant", "ANSWER"), ("system", "FEEDBACK")]
seen = {}
for name in ("llama3_1", "qwen2_5", "deepseek_r1_distill", "deepseekv3", "gptoss", "qwen3_vl", "qwen3_5_think"):
    try:
        text = render(name, *turns, add_generation_prompt=True)
        seen[name] = " ".join(sorted((word for _, word in turns if word in text), key=text.index))
    except jinja2.TemplateError as e:
        seen[name] = f"refused: {e}"
    print(f"{name:20} {seen[name]}")
still = list(seen.values()) == [
    "RULE HAND ANSWER FEEDBACK", "RULE HAND ANSWER FEEDBACK", "FEEDBACK HAND ANSWER", "RULE FEEDBACK HAND ANSWER",
    "RULE HAND ANSWER", "RULE HAND ANSWER", "refused: System message must be at the beginning."]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
