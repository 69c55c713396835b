#!/usr/bin/env bash
# Guess: from_pretrained() gives the weights that save_pretrained() wrote, or says which it could not load.
# What happens: Youtu (Tencent's Youtu-LLM) sets one row of the embedding to 0 after the file has been read, the row of
#   pad_token_id in config.json. Where the padding token has no other use nobody sees it. Often it is the end token,
#   for want of another. Then the trained row of the end token is gone, and as the output layer is the embedding, its
#   logit is 0 behind any text. The loading report names nothing. None of 120 other classes that were tried does so.
# Versions: transformers 5.24.0, torch 2.13.0.
# Why it matters here: SFT teaches the end of a turn, and a table plays the checkpoint from the disk. There the end has
#   another probability than in training, and every resume begins with that. Take pad_token_id out of config.json, and
#   compare the weights after loading, as below.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
export HF_HUB_OFFLINE=1
cd "$folder" && venv/bin/python -W ignore - <<'PYTHON'
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
END = 2
small = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, bos_token_id=1, eos_token_id=END, tie_word_embeddings=True)
youtu = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
prompt = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))

def train_save_load(kind, pad, **options):
    """P(end) behind a prompt before saving and after loading, the rows that changed, and what the report names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, pad_token_id=pad, **options))
    model.get_input_embeddings().padding_idx = None  # else the end token's row gets no gradient
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(30):  # the end token follows this prompt
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(prompt).logits[:, -1], torch.tensor([END])).backward()
        optimizer.step()
    model.eval().save_pretrained("model")
    again, report = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        before, after = (m.eval()(prompt).logits[0, -1].softmax(-1)[END].item() for m in (model, again))
    written, read = (m.get_input_embeddings().weight for m in (model, again))
    rows = (written != read).any(1).nonzero().flatten().tolist()
    return before, after, rows, [name for name, x in report.items() if x]

print("transformers", transformers.__version__, "torch", torch.__version__)
seen = []
for kind, pad, options in (("youtu", END, youtu), ("youtu", None, youtu), ("llama", END, {})):
    seen.append(train_save_load(kind, pad, **options))
    print("{}, pad_token_id {}: P(end) {:.3f} before saving, {:.3f} after loading; rows changed {}, reported {}"
          .format(kind, pad, *seen[-1]))
kept = [rows for _, _, rows, _ in seen] == [[END], [], []] and seen[0][0] > 0.9 > 0.6 > seen[0][1]
raise SystemExit(0 if kept and not any(report for *_, report in seen) else "the behaviour has changed")
PYTHON
