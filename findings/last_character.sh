#!/usr/bin/env bash
# Guess: lm-eval's task group bbh takes what stands behind "the answer is " as the answer, with or without a full stop.
# What happens: its expression (.*)(?=.) ends one character before the end of the line, whichever that character is, as
#   the last dot stands for any. Without a full stop 24 is read as 2, True as Tru and (A) as (A, all wrong.
#   And 240 is read as 24, which is right where 24 is wanted. There is no error and no "[invalid]".
# Versions: lm_eval 0.4.13; the template of bbh_cot_fewshot, version 4, from which all 27 tasks of the group take the
#   filter.
# Why it matters here: SFT and RL change whether an answer ends in a full stop, and a score over 27 tasks moves by all
#   of it, up or down, with no change in what the model can do. Few-shot examples teach a base model the full stop, and
#   chat models often leave it out or write **24**. Read some [filtered] answers, not only the score. This repository
#   asks for JSON.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps --no-compile lm_eval==0.4.13 PyYAML==6.0.4
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import distribution
import yaml
from lm_eval.filters.extraction import RegexFilter

harness = distribution("lm_eval")
home = harness.locate_file("lm_eval/tasks/bbh/cot_fewshot")
with open(home / "_cot_fewshot_template_yaml", encoding="utf-8") as f:
    task = yaml.safe_load(f)
options = task["filter_list"][0]["filter"][0]
extract = RegexFilter(options["regex_pattern"])
tasks = [path.read_text(encoding="utf-8") for path in home.glob("*.yaml") if not path.name.startswith("_")]
heirs = sum("_cot_fewshot_template_yaml" in text and "filter_list" not in text for text in tasks)

print("lm_eval", harness.version, "bbh_cot_fewshot", task["metadata"]["version"], "pattern", options["regex_pattern"])
print("tasks that take this filter from the template:", heirs, "of", len(tasks))
seen = []
for answer, wanted in (("So the answer is 24.", "24"), ("So the answer is 24", "24"), ("So the answer is 240", "24"),
                       ("So the answer is True", "True"), ("So the answer is (A)", "(A)"),
                       ("So the answer is (A).", "(A)"), ("So the answer is -219", "-21")):
    found = list(extract.apply([[answer]], [{}]))[0][0]
    seen.append(found == wanted)
    print(f"{answer!r:24} wanted {wanted!r:6} found {found!r:6} {'right' if seen[-1] else 'wrong'}")
still = seen == [True, False, True, False, False, True, True] and heirs == len(tasks)
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
