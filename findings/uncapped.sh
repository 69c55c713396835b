#!/usr/bin/env bash
# Guess: CTranslate2's converter for transformers refuses what its engine cannot compute, as it refuses a YaRN scaling.
#   A Gemma 2 that it converts gives the same log-probs.
# What happens: Gemma 2 bends its logits, cap * tanh(x / cap): those of attention at 50, those of the last layer at 30.
#   The converted model does neither, without a warning, while the same converter keeps the last cap of Gemma 4. The
#   last cap keeps the order of the logits, so greedy answers stay. The probabilities do not: large logits are no longer
#   held down, and entropy is lost. If config.json has no caps, the two agree to 1e-4.
# Versions: ctranslate2 4.8.5, transformers 5.24.0, torch 2.13.0.
# Why it matters here: on a CPU it is tempting to sample with a fast engine and to train with torch. PPO's ratios, the
#   KL penalty and pass@k at T = 1 all need the probabilities that were sampled from. Compare log-probs token by
#   token, as below, and not greedy texts.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0 ctranslate2==4.8.5
export HF_HUB_OFFLINE=1
cd "$folder" && venv/bin/python -W ignore - 2> noise <<'PYTHON' || { cat noise; exit 1; }
import ctranslate2, numpy, tokenizers, torch, transformers
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast

transformers.logging.disable_progress_bar()
names = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"w{i}" for i in range(4, 64)]
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
tok = PreTrainedTokenizerFast(tokenizer_object=words, **{f"{x}_token": f"<{x}>" for x in ("pad", "eos", "bos", "unk")})
ids = torch.randint(4, 64, (1, 60), generator=torch.Generator().manual_seed(0))

def compare(attention_cap, last_cap):
    """Log-probs [60, 64] of a random Gemma 2 by transformers and by CTranslate2."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=attention_cap,
        final_logit_softcapping=last_cap,
        tie_word_embeddings=False)).eval()
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=3.0 if name == "lm_head.weight" else 1.0)
    model.save_pretrained("model")
    tok.save_pretrained("model")
    ctranslate2.converters.TransformersConverter("model").convert("converted", force=True)
    engine = ctranslate2.Generator("converted", compute_type="float32", intra_threads=1)
    theirs = engine.forward_batch([[names[i] for i in ids[0]]], return_log_probs=True)
    with torch.no_grad():
        return model(ids).logits[0].log_softmax(-1), torch.tensor(numpy.array(theirs))[0]

def entropy(logp):
    return -(logp.exp() * logp).sum(-1).mean().item()

print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
seen = []
for caps in ((None, None), (50.0, 30.0), (None, 30.0), (50.0, None)):
    ours, theirs = compare(*caps)
    seen.append((ours - theirs).abs().max().item())
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    print(f"caps {caps}: log-probs differ by up to {seen[-1]:.0e}; entropy {entropy(ours):.2f} and "
          f"{entropy(theirs):.2f} nats; same likeliest token at {same:.0%} of the places")
raise SystemExit(0 if seen[0] < 1e-3 and min(seen[1:]) > 0.5 else "the behaviour has changed")
PYTHON
