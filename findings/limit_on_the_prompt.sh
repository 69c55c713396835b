#!/usr/bin/env bash
# Guess: GenerationParameters(max_new_tokens=100) of lighteval limits the answers to 100 new tokens.
# What happens: with models of transformers it cuts the PROMPTS, to their last 100 tokens: the question loses its
#   beginning, and a chat its system turn, its examples and the marks in front. The answers keep the length that the
#   task asks for or, if it asks for none, get all that the model's context has. The count of truncated tokens does not
#   tell: it is the prompt's characters less its tokens, so it is above 0 for whole prompts, too. No warning comes.
# Versions: lighteval 0.13.0, transformers 5.24.0, torch 2.13.0.
# Why it matters here: a limit on the answers is the first thing that one sets, to save time, and it is set alike for
#   base, SFT and RL. All of them then answer questions that have no beginning, and the table compares guesses. Leave it
#   out and set the task's generation_size, and look at input_tokens of an answer.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 \
    lighteval==0.13.0
export HF_HUB_OFFLINE=1
cd "$folder" && venv/bin/python -W ignore - 2> log <<'PYTHON' || { cat log; exit 1; }
from importlib.metadata import version
import tokenizers, torch
from lighteval.models.model_input import GenerationParameters
from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
from lighteval.tasks.requests import Doc
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

names = ["<pad>", "</s>", "?", *"0123456789", "target", "cards", "user", "assistant"]
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="?"))
words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tok = PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="?", pad_token="<pad>", eos_token="</s>",
    chat_template="{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant ")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1))
for p in (p for p in model.parameters() if p.ndim == 2):
    torch.nn.init.normal_(p, std=0.3)
model.save_pretrained("model")
tok.save_pretrained("model")
question = "target 2 4 cards 3 8 3 8"

def ask(limit, size):
    """The prompt as it was read, and the length of the answer. limit: max_new_tokens. size: what the task asks for."""
    config = TransformersModelConfig(model_name="model", device="cpu", batch_size=1, cache_dir=f"cache {limit} {size}",
                                     generation_parameters=GenerationParameters(max_new_tokens=limit))
    doc = Doc(query=question, choices=["1"], gold_index=0, generation_size=size, stop_sequences=[], task_name="cards")
    answer = TransformersModel(config).greedy_until([doc])[0]
    return tok.decode(answer.input_tokens), len(answer.output_tokens[0]), answer.truncated_tokens_count

print(*(f"{name} {version(name)}" for name in ("lighteval", "transformers", "torch")))
seen = {}
for limit, size in ((None, 20), (4, 20), (4, None), (30, 20)):
    seen[limit, size] = read, written, cut = ask(limit, size)
    print(f"max_new_tokens={limit}, generation_size={size}: read '{read}', wrote {written} tokens, 'truncated' {cut}")
whole, part = f"user {question} assistant", "3 8 assistant"
kept = [read for read, *_ in seen.values()]
raise SystemExit(0 if kept[0] == kept[3] == whole and kept[1] == kept[2] and len(kept[1].split()) == 4
                 and min(seen[4, 20][1], seen[4, None][1]) > 4 else f"the behaviour has changed: {seen}")
PYTHON
