#!/usr/bin/env bash
# Guess: JSON has no dates, so a string in a JSON Lines file comes out of datasets as the same string, at least if
#   features= calls the column a string.
# What happens: if all strings of a column look like ISO dates, each is read as a datetime. In an f-string "2024-07-26"
#   is then "2024-07-26 00:00:00". With features= the column is one of strings, and these have the time of day, too. One
#   row that is no date saves the others in a small file, and Dataset.from_list() never changes them. So two splits of
#   one set can differ, and rows that leave by to_json() come back as others.
# Versions: datasets 5.2.0 with pyarrow 26.0.1.
# Why it matters here: questions for a date are common about pictures of documents. SFT would teach the time of day, and
#   a rule that compares the answer with the reference would pay nothing, however good the model is. Read the lines with
#   json.loads(), as this repository does, and give them to Dataset.from_list() if a Dataset is needed.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
HF_HOME="$folder/cache" "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json, os, sys
import datasets, pyarrow
from datasets import Dataset, Features, Value

datasets.disable_progress_bars()
question = "On which day was the invoice paid?"
dates = [{"question": question, "answer": day} for day in ("2024-07-26", "2023-01-09")]
mixed = dates + [{"question": question, "answer": "not yet"}]

def from_json(name, rows, **options):
    """The rows, written as JSON Lines and read back."""
    path = os.path.join(sys.argv[1], name + ".jsonl")
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return Dataset.from_json(path, **options)

types = Features({"question": Value("string"), "answer": Value("string")})
seen = {"from_json, all dates": from_json("dates", dates),
        "from_json, one is none": from_json("mixed", mixed),
        "from_json, features=": from_json("typed", dates, features=types),
        "from_list": Dataset.from_list(dates)}
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
for name, rows in seen.items():
    print(f"{name:24} {rows.features['answer'].dtype:14} target: {rows[0]['answer']}")
equal = [str(rows[0]["answer"]) == "2024-07-26" for rows in seen.values()]
raise SystemExit(0 if equal == [False, True, False, True] else "the behaviour has changed")
PYTHON
