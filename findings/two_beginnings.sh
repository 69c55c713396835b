#!/usr/bin/env bash
# Guess: Inspect's provider "hf" gives a model its prompt as apply_chat_template(..., tokenize=True) would.
# What happens: the template's text is tokenised once more with special tokens. Where the template begins with the BOS
#   token and the tokenizer adds one too (Llama 3, Gemma, Mistral), the model reads two of them. No model was trained on
#   that, transformers says nothing, and answers of greedy decoding differ. The prompt's token count shows it: one more.
#   A tokenizer without a BOS token (Qwen) is not concerned. (lighteval 0.13.0 was seen to do the same.)
# Versions: inspect-ai 0.3.285, transformers 5.24.0, torch 2.13.0.
# Why it matters here: a table of Inspect and one of eval.py measure two different prompts, and one checkpoint seems to
#   be two. encode() here adds the BOS token only where the text does not begin with it. With Inspect give the model's
#   argument tokenizer_call_args={"add_special_tokens": False}.
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
words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant "

def ask(template, **options):
    """What the model reads for one question, and its greedy answer."""
    tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="<pad>", bos_token="<s>",
                                  eos_token="</s>", chat_template=template)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2))
    for p in (p for p in model.parameters() if p.ndim == 2):
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained("model")
    tok.save_pretrained("model")
    api = get_model("hf/tiny", model_path="model", device="cpu", do_sample=False, memoize=False, **options)
    read, generate = [], api.api.model.generate
    api.api.model.generate = lambda input_ids, **more: (read.append(input_ids[0]), generate(input_ids, **more))[1]
    output = asyncio.run(api.generate("8 8 3 3", config=GenerateConfig(max_tokens=6)))
    wanted = tok.apply_chat_template([{"role": "user", "content": "8 8 3 3"}], add_generation_prompt=True)["input_ids"]
    print(f"  {tok.decode(read[0])} -> {output.completion}   ({output.usage.input_tokens} tokens read)")
    return read[0].tolist(), wanted

print("inspect-ai", inspect_ai.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("a template that writes the BOS token, as Llama 3's:")
read, wanted = ask("{{ bos_token }} " + template)
print("the same, without special tokens:")
read_plain, wanted_plain = ask("{{ bos_token }} " + template, tokenizer_call_args={"add_special_tokens": False})
print("a template that leaves it to the tokenizer:")
read_left, _ = ask(template)
two = read == [1] + wanted and read_plain == wanted_plain and read_left[:2] == [1, names.index("user")]
raise SystemExit(0 if two else "the behaviour has changed")
PYTHON
