#!/usr/bin/env bash
# Guess: save_pretrained() writes a tokenizer as it is: with the padding_side that was set, and without what one call
#   asked for. A call with truncation=True cuts the texts of that call and nothing else.
# What happens: padding and truncation of a call are set on the tokenizer below and stay until the next call, though the
#   docstring of the method that sets them says that they are taken back. tokenizer.json has them, and a padding_side
#   that was set as an attribute is nowhere else. So "left" survives saving if the LAST call before it padded, and is
#   lost if it did not. One call with padding_side="left" becomes the loaded tokenizer's default. And behind a call with
#   truncation=True everybody who reads tokenizer.json, or the loaded tokenizer's backend_tokenizer, gets cut texts.
#   There is no warning.
# Versions: transformers 5.24.0, tokenizers 0.23.3. Qwen2 and GPT-2; Llama and Gemma pad on the left anyway.
# Why it matters here: each checkpoint saves the tokenizer, and whether an evaluation pads its prompts on the wrong side
#   would hang on what the training loop encoded last. Servers and grammar libraries read tokenizer.json, and a prompt
#   that is cut to the length of an SFT row gets an answer, too. Pass padding_side to from_pretrained(), which is kept,
#   and call tok.backend_tokenizer.no_truncation() before saving; or pad lists of ids, as this repository does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile transformers==5.24.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder/saved" <<'PYTHON'
import sys
import tokenizers, transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2Tokenizer

PROMPT = "123456789"  # nine tokens

def saved(last_call, attribute=None, **options):
    """A tokenizer that was called once and saved -> what the loaded one has for a padding side, and the number of the
    prompt's tokens for it, for its backend_tokenizer, and for tokenizers."""
    tok = Qwen2Tokenizer(vocab={t: i for i, t in enumerate([*"0123456789", "<|endoftext|>"])}, merges=[], **options)
    if attribute:
        tok.padding_side = attribute
    if last_call is not None:
        tok(["12", "1234"], **last_call)
    tok.save_pretrained(sys.argv[1])
    loaded = AutoTokenizer.from_pretrained(sys.argv[1])
    below = len(loaded.backend_tokenizer.encode(PROMPT).ids)
    return (loaded.padding_side, len(loaded(PROMPT).input_ids), below,
            len(Tokenizer.from_file(f"{sys.argv[1]}/tokenizer.json").encode(PROMPT).ids))

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
cases = {"left set, no call": (None, "left"), "left set, last call plain": ({}, "left"),
         "left set, last call padded": ({"padding": True}, "left"),
         "nothing set, last call padded": ({"padding": True}, None),
         "nothing set, last call padded on the left": ({"padding": True, "padding_side": "left"}, None),
         "nothing set, last call cut to 3": ({"truncation": True, "max_length": 3}, None)}
seen = {name: saved(*case) for name, case in cases.items()}
seen["left given to the class, last call plain"] = saved({}, padding_side="left")
for name, (side, *counts) in seen.items():
    print(f"{name:41} loaded: pads on the {side:5}; tokens: call {counts[0]}, backend {counts[1]}, file {counts[2]}")
sides = [side for side, *_ in seen.values()] == ["right", "right", "left", "right", "left", "right", "left"]
cut = [counts for _, *counts in seen.values()] == [[9, 9, 9]] * 5 + [[9, 3, 3], [9, 9, 9]]
raise SystemExit(0 if sides and cut else "the behaviour has changed")
PYTHON
