#!/usr/bin/env bash
# Guess: GenerateConfig(logprobs=True) of Inspect gives the log-prob of each token of the answer, as its documentation
#   says ("log probabilities of the output tokens"), with every provider.
# What happens: the provider "hf", for transformers models on this machine, gives the likeliest token of each place and
#   ITS log-prob, whichever token was sampled. Read in a row the tokens are another text than the answer, and their sum
#   is too high. At T = 0 the two are one, so a first look at greedy answers shows nothing wrong. And behind an answer
#   that ended early come entries for the padding, as many as the longest answer of the batch needs.
# Versions: inspect-ai 0.3.285, transformers 5.24.0, torch 2.13.0.
# Why it matters here: log-probs of sampled answers are what calibration, perplexity, the KL between two checkpoints
#   and an off-policy ratio are computed from. Score the answer again with the model itself, as score() does here.
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
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                     num_attention_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=2)).eval()
for p in (p for p in model.parameters() if p.ndim == 2):
    torch.nn.init.normal_(p, std=0.3)
model.lm_head.weight.data[:4] = 0  # ends and the like are rare
model.save_pretrained("model")
tok.save_pretrained("model")

def ask(questions, sample):
    api = get_model("hf/tiny", model_path="model", device="cpu", do_sample=sample, memoize=False)
    config = GenerateConfig(max_tokens=24, logprobs=True, temperature=1.0 if sample else None)
    async def all_at_once():
        return await asyncio.gather(*(api.generate(question, config=config) for question in questions))
    torch.manual_seed(0)
    return asyncio.run(all_at_once())

print("inspect-ai", inspect_ai.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
equal = {}
for sample in (False, True):
    for question, output in zip(("1 2 3 4", "8 8 3 3"), ask(("1 2 3 4", "8 8 3 3"), sample)):
        prompt = f"user {question} assistant "  # as the template writes it
        ids, start = tok(prompt + output.completion, return_tensors="pt").input_ids, len(tok(prompt).input_ids)
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)[start - 1:-1].gather(1, ids[0, start:, None]).sum().item()
        said, listed = output.completion.split(), output.choices[0].logprobs.content
        print(f"sampled: {sample}\n  answer   {' '.join(said)}\n  logprobs {' '.join(x.token for x in listed)}"
              f"\n  log-prob of the answer {logp:.1f}, sum of its first {len(said)} logprobs "
              f"{sum(float(x.logprob) for x in listed[:len(said)]):.1f}; entries: {len(listed)}")
        equal.setdefault(sample, []).append(said == [x.token for x in listed[:len(said)]])
raise SystemExit(0 if all(equal[False]) and not any(equal[True]) else "the behaviour has changed")
PYTHON
