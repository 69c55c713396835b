#!/usr/bin/env bash
# Guess: metrics={"legal": [accuracy(), stderr(), stderr(cluster="hand")]} reports, for the key "legal" of a score that
#   is a dictionary, the three metrics that stand there. And in {"*": [stderr()], "legal": [stderr(cluster="hand")]}
#   "legal" gets its own error, or both.
# What happens: a key gets one metric of each name, the first one, whatever the arguments. stderr() and
#   stderr(cluster=...) have one name, so do ci(0.95) and ci(0.99), and grouped() by one key and by another. The second
#   one is dropped without a word, and what is left is called "stderr". If "*" stands first it wins over the key's own
#   list. The same list on a scorer with plain scores gives both, as stderr and stderr2.
# Versions: inspect_ai 0.3.285.
# Why it matters here: several answers per hand, or turns per route, are no independent trials. Here the error bar of
#   "legal" is three times too small, though the clustered one was asked for, and every other key may be right. Ask for
#   one metric of each name per key, put "*" last, and look for cluster= in the params of what the log reports.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile inspect_ai==0.3.285
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, accuracy, ci, grouped, scorer, stderr

CLUSTERED = stderr(cluster="hand")
hands = [Sample(input="Make 24.", target="", metadata={"hand": hand, "suit": "red black".split()[hand // 5],
                                                       "answer": answer}) for hand in range(10) for answer in range(8)]

def reported(metrics, plain=False):
    """What the log reports for the key "legal" -> [[name, arguments, value]]. All answers to a hand are alike."""
    @scorer(metrics=metrics)
    def judge():
        async def score(state, target):
            legal = float(state.metadata["hand"] % 2)
            return Score(value=legal if plain else {"legal": legal, "right": legal})
        return score

    task = Task(dataset=hands, solver=[], scorer=judge())
    log = eval(task, model="mockllm/model", display="none", log_dir="logs")[0]
    found = next(x for x in log.results.scores if plain or x.name == "legal").metrics
    return [(k, {n: v for n, v in x.params.items() if n != "metric"}, round(x.value, 3)) for k, x in found.items()]

print("inspect_ai", version("inspect_ai"), "10 hands, 8 answers to each")
seen = {}
for name, metrics, plain in (
        ("plain scores", [accuracy(), stderr(), CLUSTERED], True),
        ("key, clustered only", {"legal": [accuracy(), CLUSTERED]}, False),
        ("key, both", {"legal": [accuracy(), stderr(), CLUSTERED]}, False),
        ("* first", {"*": [accuracy(), stderr()], "legal": [CLUSTERED]}, False),
        ("* last", {"legal": [CLUSTERED], "*": [accuracy(), stderr()]}, False),
        ("key, two levels", {"legal": [ci(0.95), ci(0.99)]}, False),
        ("key, two groupings", {"legal": [grouped(accuracy(), key) for key in ("suit", "answer")]}, False)):
    seen[name] = reported(metrics, plain)
    print(f"{name:20}", "; ".join(f"{metric} {arguments or ''} {value}" for metric, arguments, value in seen[name]))
values = {name: [value for _, _, value in metrics] for name, metrics in seen.items()}
still = (values["plain scores"] == [0.5, 0.056, 0.167] and values["key, clustered only"] == [0.5, 0.167]
         and values["key, both"] == values["* first"] == [0.5, 0.056] and values["* last"] == [0.167, 0.5]
         and [x[1]["level"] for x in seen["key, two levels"]] == [0.95] * 2
         and {x[1]["group_key"] for x in seen["key, two groupings"]} == {"suit"})
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
