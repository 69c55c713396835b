#!/usr/bin/env bash
# Guess: ModelOutput.usage of Inspect counts the tokens of one sample: of its prompt and of its answer.
# What happens: with the provider "hf" both numbers are those of the batch in which the sample happened to be: the
#   longest prompt, and the longest answer, padding included. A batch is what was asked at about the same time. So the
#   same question with the same greedy answer costs 12 tokens alone and 38 in company, and a short answer that ended by
#   itself counts as one that ran into max_tokens. A sample's token_limit is compared with these sums as well.
# Versions: inspect-ai 0.3.285, transformers 5.24.0, torch 2.13.0.
# Why it matters here: "RL makes answers shorter" is read off such counts, and so is the price of an attempt. They would
#   change with the other samples, with max_connections and with the speed of the machine. Count the tokens of the
#   answer's text, as below.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 \
    inspect-ai==0.3.285
export HF_HUB_OFFLINE=1
cd "$folder" && venv/bin/python -W ignore - <<'PYTHON'
import asyncio, inspect_ai, tokenizers, torch, transformers
from inspect_ai.model import GenerateConfig, get_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.disable_progress_bar()
names = ["<pad>", "<s>", "</s>", "?", *"0123456789+-*/()=", "user", "assistant"]
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="?"))
words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tok = PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="?", pad_token="<pad>", eos_token="</s>",
    chat_template="{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant ")
torch.manual_seed(31)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=2))
for p in (p for p in model.parameters() if p.ndim == 2):
    torch.nn.init.normal_(p, std=0.3)
model.save_pretrained("model")
tok.save_pretrained("model")

def ask(*questions):
    """Greedy answers to questions that come at once -> [(answer, its tokens, the usage's tokens), ...]."""
    api = get_model("hf/tiny", model_path="model", device="cpu", do_sample=False, memoize=False)
    async def all_at_once():
        return await asyncio.gather(*(api.generate(q, config=GenerateConfig(max_tokens=24)) for q in questions))
    answers = []
    for question, output in zip(questions, asyncio.run(all_at_once())):
        counted = len(tok(f"user {question} assistant ").input_ids), len(tok(output.completion).input_ids)
        reported = output.usage.input_tokens, output.usage.output_tokens
        print(f"  {question} -> {output.completion}   (prompt and answer: {counted}, reported {reported})")
        answers.append((output.completion, counted, reported))
    return answers

print("inspect-ai", inspect_ai.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
long_one = "1 2 3 4 5 6 7 8 9 + 1 2"
print("alone:")
alone = ask("8 8 3 3")[0]
print("with another question:")
together, other = ask("8 8 3 3", long_one)
assert alone[0] == together[0] and alone[1][0] == alone[2][0], "the answer, or the count of one alone, has changed"
raise SystemExit(0 if together[2] == other[2] != alone[2] else "the behaviour has changed")
PYTHON
