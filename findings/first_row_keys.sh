#!/usr/bin/env bash
# Guess: Dataset.from_list(rows) has a column for every key of the rows, with None where a row lacks it.
# What happens: only the keys of the first row become columns. A key that comes in later rows is dropped without a
#   word. The same rows in another order, or from a JSON Lines file, keep it.
# Versions: datasets 5.2.0.
# Why it matters here: a system turn, a picture or a rule that only some demonstrations have is lost for all of them if
#   the first one lacks it, and training runs on. Give every row every key.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
HF_HOME="$folder/cache" "$folder/venv/bin/python" - "$folder/rows.jsonl" <<'PYTHON'
import json, sys
import datasets

datasets.disable_progress_bars()
rows = [{"prompt": "2 3 4 6"}, {"prompt": "3 3 8 8", "system": "J, Q and K count as 10."}]
with open(sys.argv[1], "w") as f:
    f.writelines(json.dumps(row) + "\n" for row in rows)
columns = {"from_list(rows)": datasets.Dataset.from_list(rows).column_names,
           "from_list(rows[::-1])": datasets.Dataset.from_list(rows[::-1]).column_names,
           "from_json(file)": datasets.Dataset.from_json(sys.argv[1]).column_names}
print("datasets", datasets.__version__)
for name, names in columns.items():
    print(f"{name:24}", names)
still = [sorted(names) for names in columns.values()] == [["prompt"], ["prompt", "system"], ["prompt", "system"]]
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
