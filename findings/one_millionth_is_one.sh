#!/usr/bin/env bash
# Guess: bounds in a JSON schema, {"type": "number", "minimum": 0, "maximum": 1}, forbid numbers outside of them and
#   nothing else. A model that wants to write 1e-06 within them can.
# What happens: with a bound xgrammar allows no exponent and six decimals at most. Without one it allows both. The digit
#   before the e has been written when the e is refused, so the object can only end there, or go on in decimals: 1e-06
#   becomes 1, the least likely becomes the certain. 2.5e-06 becomes 2.5 under "minimum": 0, and 0.0000004 becomes
#   0.000000. What comes out is valid under the schema, and no error or warning comes. Plain 0.000001 passes.
# Versions: xgrammar 0.2.9, with torch 2.13.0 and transformers 5.24.0, which it imports.
# Why it matters here: probabilities, confidences, p-values and learning rates are asked for with bounds, as by
#   Field(ge=0, le=1), and written with exponents where they are small. xgrammar is a usual backend of large servers
#   for such schemas. A calibration curve, or a reward for a stated confidence, is then computed from numbers
#   that the model did not mean. Leave the bounds out and check them behind, or ask for a string or a percentage.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 pydantic==2.14.4 \
  apache-tvm-ffi==0.1.15.post2
"$folder/venv/bin/pip" install -q --no-compile --no-deps xgrammar==0.2.9
"$folder/venv/bin/python" - 2> >(grep -v "PyTorch was not found" >&2) <<'PYTHON'
import json
from importlib.metadata import version
import xgrammar

letters = [bytes([code]) for code in range(32, 127)]  # a tokenizer of single characters
END = len(letters)
info = xgrammar.TokenizerInfo(letters + [b"</s>"], vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END])
compiler = xgrammar.GrammarCompiler(info)

def said(wanted, **bounds):
    """What is left of a number that a model wants to write; where a character is refused, it closes the object."""
    schema = {"type": "object", "properties": {"p": {"type": "number", **bounds}}, "required": ["p"]}
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    text = ""
    for letter in '{"p": ' + wanted + "}":
        if not matcher.accept_string(letter):
            letter = "}"
            if not matcher.accept_string(letter):
                return "no end"
        text += letter
        if letter == "}":
            break
    assert matcher.accept_token(END)
    return json.loads(text)["p"]

print("xgrammar", version("xgrammar"), "torch", version("torch"))
wanted, seen = ("0.25", "0.000001", "1e-06", "1.5e-01", "2.5e-06", "0.0000004", "0.30000000000000004"), []
for bounds in ({}, {"minimum": 0}, {"minimum": 0, "maximum": 1}):
    seen.append([said(number, **bounds) for number in wanted])
    print(f"{json.dumps(bounds):31}", ", ".join(f"{number} is {value}" for number, value in zip(wanted, seen[-1])))
still = seen == [[float(number) for number in wanted], [0.25, 1e-6, 1, 1.5, 2.5, 0, 0.3],
                 [0.25, 1e-6, 1, "no end", "no end", 0, 0.3]]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
