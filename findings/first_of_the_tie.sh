#!/usr/bin/env bash
# Guess: (logits - torch.log(-torch.log(torch.rand_like(logits)))).argmax(-1), the Gumbel trick, samples from
#   softmax(logits). In bfloat16 it does so with two or three correct digits.
# What happens: near 1 the numbers of bfloat16 are 1/256 apart. So of 1,000 draws of rand() about four are .9961, the
#   largest one. They tie for the largest noise, and argmax() takes the first. Of 1,000 equally likely tokens the first
#   half gets nine samples in ten, and of 50,000 every sample. In float16 it is the same for large vocabularies.
#   torch's own ways of sampling draw exponential noise, which is finest where it decides, and are right in all types:
#   gumbel_softmax(), probs / exponential_(), multinomial().
# Versions: torch 2.13.0, on the CPU.
# Why it matters here: the trick is common in samplers of one's own, and on a GPU the logits are in bfloat16. An answer
#   looks fine where one token is likely. Where many are, low ids are sampled and the others are never explored,
#   and log-probs are those of another distribution. Draw the noise in float32, or by exponential_().
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

ways = {"rand": lambda x: (x - torch.log(-torch.log(torch.rand_like(x)))).argmax(-1),
        "rand in float32": lambda x: (x - torch.log(-torch.log(torch.rand(x.shape)))).argmax(-1),
        "gumbel_softmax": lambda x: torch.nn.functional.gumbel_softmax(x, hard=True).argmax(-1),
        "exponential_": lambda x: (x.softmax(-1) / torch.empty_like(x).exponential_()).argmax(-1),
        "multinomial": lambda x: torch.multinomial(x.softmax(-1), 1)[:, 0]}
print("torch", torch.__version__)
torch.manual_seed(0)
seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for tokens, samples in ((1000, 4000), (50000, 400)):
        logits = torch.zeros(samples, tokens, dtype=dtype)  # all tokens are equally likely
        shares = {name: (way(logits) < tokens // 2).float().mean().item() for name, way in ways.items()}
        seen[dtype, tokens] = shares
        print(f"{str(dtype)[6:]}, {tokens} tokens: samples in the first half:",
              "; ".join(f"{name} {share:.2f}" for name, share in shares.items()))
right = all(abs(share - 0.5) < 0.1 for shares in seen.values() for name, share in shares.items() if name != "rand")
wrong = seen[torch.bfloat16, 1000]["rand"] > 0.8 and all(seen[t, 50000]["rand"] > 0.95
                                                        for t in (torch.bfloat16, torch.float16))
kept = right and wrong and abs(seen[torch.float32, 50000]["rand"] - 0.5) < 0.1
raise SystemExit(0 if kept else "the behaviour has changed")
PYTHON
