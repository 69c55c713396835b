#!/usr/bin/env bash
# Guess: generate(repetition_penalty=1.1) makes a model say less twice. Whether and when an answer ends is not its
#   business, as an answer has its end token once.
# What happens: the prompt counts as said, and a prompt in ChatML, as of most chat models, holds the end token behind
#   each of its turns. So the end of every answer is a repetition: its logit is divided by 1.1, which for a logit of 20
#   is 1.8 nats. The same model ends its answers as before if the prompt has another mark between the turns. And since
#   the logit itself is divided, not its distance from the others, adding 10 to all logits makes it still rarer.
# Versions: transformers 5.24.0, torch 2.13.0. Here a model whose logits are always 20 for the end and 15 for 62 words.
# Why it matters here: some released models bring a penalty in generation_config.json, and generate() takes it without a
#   word. Answers are then longer, and cut off more often, than the policy's own; PPO's log-probabilities, from a
#   forward pass, are those of another policy than the one that sampled. Pass repetition_penalty=1.0 where answers are
#   sampled for training, and compare the sampler's log-probabilities with the model's once.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

END, MARK = 0, 63
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=1, bos_token_id=None, eos_token_id=END, pad_token_id=MARK))

def answers(mark, penalty, shift=0):
    """Share of 2,000 answers that end at once, and their mean length. mark: what ends the turns of the prompt."""
    with torch.no_grad():  # logits that do not depend on what was read
        model.lm_head.weight.fill_((15 + shift) / 16)
        model.lm_head.weight[END], model.lm_head.weight[MARK] = (20 + shift) / 16, -20
    torch.manual_seed(0)
    prompt = torch.tensor([[1, mark, 2, mark, 3]] * 2000)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, max_new_tokens=60,
                         repetition_penalty=penalty)[:, 5:]
    ended = (out == END).int().argmax(1).float()
    return round((out[:, 0] == END).float().mean().item(), 2), round(ended.mean().item() + 1, 1)

with torch.no_grad():
    for weights in model.model.layers.parameters():
        weights.zero_()
    model.model.embed_tokens.weight.fill_(1)
print("transformers", transformers.__version__, "torch", torch.__version__)
seen = {}
for penalty in (1.0, 1.1):
    for name, mark, shift in (("another mark", MARK, 0), ("the end token", END, 0),
                              ("the end token, logits + 10", END, 10)):
        seen[name, penalty] = answers(mark, penalty, shift)
        print(f"penalty {penalty}, turns of the prompt end with {name:26}: {seen[name, penalty][0]:.2f} end at once, "
              f"mean length {seen[name, penalty][1]}")
plain = {seen[key] for key in seen if key[1] == 1.0}
share = [seen[name, 1.1][0] for name in ("another mark", "the end token", "the end token, logits + 10")]
raise SystemExit(0 if len(plain) == 1 and share[0] > 2 * share[1] > 2 * share[2] else "the behaviour has changed")
PYTHON
