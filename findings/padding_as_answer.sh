#!/usr/bin/env bash
# Guess: mlx-lm's fine-tuning takes the loss of a row's tokens, with mask_prompt of the answer's, up to the token that
#   ends it. Padding carries no loss.
# What happens: the first token of padding behind each row carries loss as well. Rows are padded to a multiple of 32 and
#   one more, so there always is one. The model is taught to say id 0 behind the end, and the loss of training,
#   validation and test is a mean over one token too many. With short answers that is a large share: for an answer of
#   two tokens a third. A model trained elsewhere that is certain of all its answers is given a loss of 10.
# Versions: mlx-lm 0.32.2, mlx 0.32.4 (its CPU build), transformers 5.24.0.
# Why it matters here: on a Mac it is the usual way to fine-tune. Losses and perplexities are compared with those of
#   torch, and an answer of V-IRL has about ten tokens. Where the end token has id 0, the model learns to say it twice.
#   Give train() and evaluate() a loss of your own, with "steps < lengths[:, 1:]", as below.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 transformers==5.24.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python -W ignore - 2> log <<'PYTHON' || { cat log; exit 1; }
import contextlib, io
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers, mlx_lm, transformers
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, train

mx.disable_compile()
rows = [([3 + i % 7, 10 + i % 7, 2], 1) for i in range(28)]  # (ids, where the answer begins); 2 ends it

class Rows(list):
    process = staticmethod(lambda row: row)

def answers_loss(model, batch, lengths):
    """The loss of mlx-lm, without what is behind a row."""
    steps = mx.arange(1, batch.shape[1])
    mask = mx.logical_and(steps >= lengths[:, 0:1], steps < lengths[:, 1:])
    return (nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:]) * mask).sum() / mask.sum(), mask.sum()

def fitted(**loss):
    """A tiny Llama after 60 steps -> its losses by mlx-lm and of the answers, and P(id 0 behind the end)."""
    mx.random.seed(0)
    model = Model(ModelArgs(model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=64,
                            num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=20))
    data = CacheDataset(Rows(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        train(model, mlx.optimizers.Adam(1e-2), data, args=TrainingArgs(batch_size=7, iters=60), **loss)
    theirs, ours = evaluate(model, data, 7, -1), evaluate(model, data, 7, -1, loss=answers_loss)
    return theirs, ours, mx.softmax(model(mx.array([rows[0][0]]))[0, -1])[0].item()

print("mlx-lm", mlx_lm.__version__, "mlx", mx.__version__, "transformers", transformers.__version__)
seen = {name: fitted(**loss) for name, loss in {"its own loss": {}, "answers alone": {"loss": answers_loss}}.items()}
for name, (theirs, ours, padding) in seen.items():
    print(f"trained with {name}: its loss {theirs:.3f}, the answers' {ours:.3f}; P(id 0) behind the end {padding:.2f}")
(theirs, ours, padding), (theirs_2, ours_2, padding_2) = seen.values()
kept = padding > 0.9 > 0.5 > padding_2 and max(ours, ours_2) < 0.1 and theirs_2 > 0.5
raise SystemExit(0 if kept else f"the behaviour has changed: {seen}")
PYTHON
