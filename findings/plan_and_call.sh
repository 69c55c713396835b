#!/usr/bin/env bash
# Guess: an assistant turn with words and a tool call ("6 * 4 should do it", then the call) is rendered as it was said:
#   the words, the call, and then the tool's result.
# What happens: that hangs on the family. Llama 3.1 renders the call and drops the words. DeepSeek-R1's distills render
#   the words and drop the call, and the result answers a question that nobody asked. Gemma 4 moves the words BEHIND
#   the tool's result, and closes the turn there: with add_generation_prompt=True no new turn is opened. Qwen3 and
#   GLM-4.5 keep words and call. There is no error, and without words Llama and Gemma look as right as the others.
# Versions: templates in the wheel of trl 1.16.0; transformers 5.24.0, Jinja2 3.1.6.
# Why it matters here: an agent's thoughts stand in such words. SFT on such turns teaches Llama calls without a reason,
#   Gemma a reason that knows the result already, and DeepSeek no calls. In RL the next prompt does not begin with what
#   was sampled. Keep the sampled ids, look at one rendered turn of this kind, and put the words into reasoning_content
#   where the template has a place for it.
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

def render(name, words):
    """What a released template makes of a turn with these words and a call, from the user's turn on."""
    arguments = '{"formula": "CALL"}' if name == "deepseek_r1_distill" else {"formula": "CALL"}  # what each one takes
    call = {"type": "function", "id": "call00001", "function": {"name": "value_of", "arguments": arguments}}
    messages = [{"role": "user", "content": "HAND"}, {"role": "assistant", "content": words, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call00001", "name": "value_of", "content": "RESULT"}]
    with open(os.path.join(sys.argv[1], name + ".jinja"), encoding="utf-8") as f:
        text = tok.apply_chat_template(messages, chat_template=f.read(), tokenize=False, add_generation_prompt=True)
    return text[text.index("HAND"):]

def order(text):
    return [word for _, word in sorted((text.find(word), word) for word in ("WORDS", "CALL", "RESULT") if word in text)]

print("transformers", transformers.__version__, "jinja2", jinja2.__version__, "templates of trl 1.16.0")
seen = {}
for name in ("qwen3", "glm4moe", "llama3_1", "deepseek_r1_distill", "gemma4_v5"):
    text = render(name, "WORDS")
    seen[name] = order(text), order(render(name, ""))
    print(f"{name}: {', '.join(seen[name][0])}; without words: {', '.join(seen[name][1])}\n    {text!r}")
kept, bare = ["WORDS", "CALL", "RESULT"], ["CALL", "RESULT"]
still = list(seen.values()) == [(kept, bare), (kept, bare), (bare, bare), (["WORDS", "RESULT"], ["RESULT"]),
                                (["CALL", "RESULT", "WORDS"], bare)]
closed = text.endswith("WORDS<turn|>\n")  # Gemma's
raise SystemExit(0 if still and closed else "the behaviour has changed")
PYTHON
