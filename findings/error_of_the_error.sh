#!/usr/bin/env bash
# Guess: the "_stderr" that lighteval writes next to a metric is the metric's standard error, and where it comes from a
#   bootstrap more resamples (bootstrap_iters) give the same error, only less noisy.
# What happens: the spread of the resampled values IS the standard error, and lighteval divides it by the square root of
#   their number once more. With the default of 1000 it is 32 times too small, with 4000 63 times. That holds for each
#   metric whose aggregation has no "mean" in its function's name: perplexity, one's own; by the source F1, MCC, BLEU,
#   chrF. The very same scores have the right error with numpy's mean and the wrong one with a function that does it.
# Versions: lighteval 0.13.0, torch 2.13.0, numpy 2.4.6.
# Why it matters here: error bars decide whether PPO moved the perplexity of held-out answers, or whether a rule beats
#   SFT. With these every difference is "significant", and a patient user makes it worse. Multiply such a stderr by
#   the root of bootstrap_iters (of its whole thousands, above 1000), or resample the logged scores oneself, as here.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 lighteval==0.13.0 numpy==2.4.6 transformers==5.24.0
HF_HUB_OFFLINE=1 LIGHTEVAL_DISABLE_TQDM=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import math
from importlib.metadata import version
from types import SimpleNamespace
import numpy
from lighteval.logging.info_loggers import MetricsLogger
from lighteval.metrics.metrics import Metrics
from lighteval.metrics.metrics_sample import ExactMatches
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc, SamplingMethod

def share(scores):
    """The mean, under another name."""
    return sum(scores) / len(scores)

own = SampleLevelMetric(metric_name="share", sample_level_fn=ExactMatches(), category=SamplingMethod.GENERATIVE,
                        corpus_level_fn=share, higher_is_better=True)
metrics = [Metrics.exact_match.value, own, Metrics.target_perplexity.value]
task = SimpleNamespace(aggregation=lambda: {k: f for m in metrics for k, f in m.get_corpus_aggregations().items()})
random = numpy.random.default_rng(0)
answers = [ModelResponse(text=[str(23 + (x > 0.4))], logprobs=[math.log(x)]) for x in random.random(400)]
rows = [{k: v for m in metrics for k, v in m.compute_sample(doc=Doc(query="Make 24.", choices=["24"], gold_index=0),
                                                            model_response=x).items()} for x in answers]

print("lighteval", version("lighteval"), "numpy", numpy.__version__, "400 answers")
true, seen = {}, {}
for name, aggregate in task.aggregation().items():
    scores = [row[name] for row in rows]
    true[name] = numpy.std([aggregate([scores[i] for i in random.integers(400, size=400)]) for _ in range(1000)])
    print(f"{name:6} {aggregate(scores):.4f}, standard error by a bootstrap of its own {true[name]:.4f}")
for resamples in (100, 1000, 4000):
    logger = MetricsLogger()
    for row in rows:
        logger.log("cards|0", row)
    logger.aggregate({"cards|0": task}, bootstrap_iters=resamples)
    found = {name: logger.metric_aggregated["cards|0"][name + "_stderr"] for name in true}
    seen[resamples] = {name: true[name] / found[name] for name in true}
    print(f"{resamples:5} resamples:", ", ".join(f"{k}_stderr {v:.5f} ({seen[resamples][k]:.0f} times too small)"
                                                   for k, v in found.items()))
still = all(0.85 < x["em"] < 1.15 and all(0.8 < x[k] / math.sqrt(n) < 1.25 for k in ("share", "ppl"))
            for n, x in seen.items())
raise SystemExit(0 if still else f"the behaviour has changed: {seen}")
PYTHON
