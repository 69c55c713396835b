#!/usr/bin/env bash
# Guess: a chat that goes into a datasets.Dataset comes out with the same messages.
# What happens: Arrow gives all parts of a message the same keys. The text part comes back with "image": None, and the
#   template of Qwen2-VL and Qwen2.5-VL asks 'image' in part before it asks for the text. So a second picture's mark
#   replaces the question: the text is gone, and there is one mark more than there are pictures.
# Versions: datasets 5.2.0 with pyarrow 26.0.1; Qwen2.5-VL's template as in the wheel of trl 1.16.0; Jinja2 3.1.6.
# Why it matters here: demonstrations with pictures are built from such messages. Drop the keys that are None before a
#   template sees a message, or keep messages out of Arrow, as this repository does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 Jinja2==3.1.6
"$folder/venv/bin/pip" download -q --no-deps -d "$folder" trl==1.16.0
"$folder/venv/bin/python" -m zipfile -e "$folder"/trl-*.whl "$folder"
HF_HOME="$folder/cache" "$folder/venv/bin/python" - "$folder/trl/chat_templates/qwen2_5_vl.jinja" <<'PYTHON'
import sys
import datasets, jinja2, pyarrow

with open(sys.argv[1], encoding="utf-8") as f:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(f.read())
parts = [{"type": "image", "image": "cards.png"}, {"type": "text", "text": "Which cards?"}]
before = [{"role": "user", "content": parts}]
after = datasets.Dataset.from_list([{"messages": before}])[0]["messages"]
texts = [template.render(messages=messages) for messages in (before, after)]
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__, "jinja2", jinja2.__version__)
for name, messages, text in zip(("before", "after"), (before, after), texts):
    print(f"{name}: {messages[0]['content'][1]}\n{text}")
still = ["Which cards?" in text for text in texts] == [True, False] and texts[1].count("<|image_pad|>") == 2
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
