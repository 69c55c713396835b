#!/usr/bin/env bash
# Guess: the filter flexible-extract of lm-eval's GSM8K takes the last number of an answer, wherever it stands.
# What happens: its expression wants two or more of the characters $ 0-9 . , or a run of digits. So two dollar signs,
#   an ellipsis and the end of "i.e.," are numbers, too. An answer that ends in a displayed formula with a blank or a
#   new line before its closing $$ gives "$$", of which nothing is left, and counts as wrong. $$24$$ is right. There is
#   no error and no "[invalid]".
# Versions: lm_eval 0.4.13, task gsm8k version 3.
# Why it matters here: SFT and RL change how an answer is written, and this number moves with it though the arithmetic
#   does not. Compared with strict-match it looks like the tolerant one. As a reward, such an expression would teach a
#   model to write no formulas. Ask for a digit in each match, as -?[0-9][0-9.,]* does, or for JSON, as here.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps --no-compile lm_eval==0.4.13 PyYAML==6.0.4
"$folder/venv/bin/python" - <<'PYTHON'
import re
from importlib.metadata import distribution
import yaml
from lm_eval.filters.extraction import RegexFilter

harness = distribution("lm_eval")
with open(harness.locate_file("lm_eval/tasks/gsm8k/gsm8k.yaml"), encoding="utf-8") as f:
    task = yaml.safe_load(f)
options = next(x["filter"][0] for x in task["filter_list"] if x["name"] == "flexible-extract")
extract = RegexFilter(options["regex_pattern"], options["group_select"])

def judged(answer, reference):
    """What the filter takes, and what is left when the task's metric has taken out what it ignores."""
    found = left = list(extract.apply([[answer]], [{}]))[0][0]
    for pattern in task["metric_list"][0]["regexes_to_ignore"]:
        left = re.sub(pattern, "", left)
    return found, left, left == reference

print("lm_eval", harness.version, "gsm8k", task["metadata"]["version"], "pattern", options["regex_pattern"])
seen = []
for answer in ("She pays $24.", "She pays $$24$$", "She pays $$ 6 * 4 = 24 $$", "She pays\n$$\n6 * 4 = 24\n$$",
               "She pays 24, i.e., two dozen.", "She pays 24 ... and no more."):
    found, left, right = judged(answer, "24")
    seen.append(right)
    print(f"{answer!r:36} found {found!r:8} left {left!r:6} {'right' if right else 'wrong'}")
raise SystemExit(0 if seen == [True, True, False, False, False, False] else "the behaviour has changed")
PYTHON
