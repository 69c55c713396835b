#!/usr/bin/env bash
# Guess: val_batches=-1 and test_batches=-1 of mlx-lm's fine-tuning "use the entire validation set", as the help says,
#   and in training each epoch shows every row once.
# What happens: only whole batches are made. What is left over at the end is dropped, always the same rows: of 7 rows in
#   batches of 4 the last three are never trained on and never measured. An error comes only if there is not even
#   one batch. Rows are to be sorted by length before that, but what is sorted by is the number of entries of each
#   row's dictionary, so the file's order stays: the same rows share a batch in every epoch, and the last rows of the
#   file are the ones that are lost.
# Versions: mlx-lm 0.32.2, mlx 0.32.4 (its CPU build), transformers 5.24.0.
# Why it matters here: a test set of 50 hands in batches of 32 is a test set of 32, and another batch size gives
#   another one. In a file that is ordered by difficulty or by rule the hardest rows are the missing ones. Take a batch
#   size that divides the number of rows, and shuffle the file.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 transformers==5.24.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python -W ignore - 2> log <<'PYTHON' || { cat log; exit 1; }
import mlx.core as mx
import mlx_lm, tokenizers, transformers
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import default_loss, evaluate

names = ["?", "<end>", *(f"w{i}" for i in range(18))]
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="?"))
words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tok = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?", eos_token="<end>")
lengths = (9, 3, 8, 2, 7, 5, 4)
rows = [{"text": " ".join([f"w{i}"] * n)} for i, n in enumerate(lengths)]

def measured(batch_size, file):
    """Which rows of a file the evaluation of "the entire set" shows to the model."""
    model = Model(ModelArgs(model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=64,
                            num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=20))
    shown = []
    def loss(model, batch, lengths):
        shown.append(sorted(names[row[0].item()] for row in batch))
        return default_loss(model, batch, lengths)
    evaluate(model, CacheDataset(TextDataset(file, tok)), batch_size, num_batches=-1, loss=loss)
    return sorted(shown)

print("mlx-lm", mlx_lm.__version__, "mlx", mx.__version__, "transformers", transformers.__version__)
whole = measured(1, rows)
batches = measured(4, rows)
turned = measured(4, rows[::-1])
for name, seen in (("batches of 1", whole), ("batches of 4", batches), ("batches of 4, file turned round", turned)):
    print(f"{name}: {sum(map(len, seen))} of {len(rows)} rows are measured: {seen}")
kept = len(whole) == 7 and batches == [["w0", "w1", "w2", "w3"]] and turned == [["w3", "w4", "w5", "w6"]]
raise SystemExit(0 if kept else "the behaviour has changed")
PYTHON
