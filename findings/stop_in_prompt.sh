#!/usr/bin/env bash
# Guess: generate(stop_strings=["\n\n"]) ends an answer when the answer has an empty line in it.
# What happens: prompt and answer are read as one text, and the string may begin in the prompt. A prompt in ChatML ends
#   with a newline, behind <|im_start|>assistant. An answer that begins with a newline completes the string: it is over
#   after one token, and does not hold the string that ended it. The same words with another first token go on to the
#   empty line.
# Versions: transformers 5.24.0, torch 2.13.0.
# Why it matters here: such an answer has no JSON, so it is judged illegal, and RL teaches the model a first token for a
#   reason that is not in the task. Where a header or a prefilled answer ends with the beginning of a stop string, look
#   for it in the answer alone: in a StoppingCriteria that decodes the ids behind the prompt. Or stop at token ids only,
#   as rollout() in eval.py does.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # each byte is a token, and so is "\n\n"
newline = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*letters, newline * 2])}, merges=[(newline, newline)]))
core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
core.decoder = decoders.ByteLevel()
tok = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>",
                              additional_special_tokens=["<|im_start|>"])
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=None))

def said(prompt, wanted, stop):
    """What is left of an answer that the model is made to give -> str."""
    inputs, ids = tok(prompt, return_tensors="pt"), tok(wanted).input_ids
    start = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=len(ids), do_sample=False, pad_token_id=tok.pad_token_id,
                         stop_strings=[stop], tokenizer=tok,
                         prefix_allowed_tokens_fn=lambda _, row: [ids[len(row) - start]])
    return tok.decode(out[0, start:])

print("transformers", transformers.__version__, "torch", torch.__version__)
chatml = "<|im_start|>user\nMake 24.<|im_end|>\n<|im_start|>assistant\n"
words = 'I think:\n{"formula": "4*6"}\n\nAnother way is'
seen = []
for prompt, wanted, stop in ((chatml, words, "\n\n"), (chatml, "\n" + words, "\n\n"),
                             (chatml[:-1], "\n" + words, "\n\n"), (chatml + "```", "json\n{}\n```", "```")):
    seen.append(said(prompt, wanted, stop))
    print(f"prompt ends {prompt[-6:]!r:10} stop {stop!r:6} answer {seen[-1]!r}")
whole = words[:words.index("\n\n") + 2]
raise SystemExit(0 if seen == [whole, "\n", "\n" + whole, "json\n{}\n```"] else "the behaviour has changed")
PYTHON
