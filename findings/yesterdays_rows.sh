#!/usr/bin/env bash
# Guess: Dataset.from_generator(rows) runs the generator. If it draws at random without a seed, or reads a file that
#   has been edited, the next run of the script has other rows.
# What happens: the rows are written to a folder of the user's home, under a hash of the generator's code and arguments.
#   Any later call, in another process, on another day, finds that hash and returns the OLD rows; the generator is not
#   even called. What it draws, and what stands in the files that it reads, is not in the hash. keep_in_memory=True
#   changes nothing; a cache_dir of its own for each run does. Nothing is printed.
# Versions: datasets 5.2.0.
# Why it matters here: prompts for GRPO or SFT are often made this way, from a game that deals at random or a file of
#   routes. Every run then trains on the first run's deals, so three "seeds" share their data, and a
#   mended file has no effect. Dataset.from_list(list(rows())) runs the generator each time. The environments
#   here deal episodes as a function of a seed, and keep nothing.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile datasets==5.2.0
cat > "$folder/rows.py" <<'PYTHON'
import random
import sys
from datasets import Dataset

called = []

def rows(file):
    called.append(file)
    with open(file) as f:
        route = f.read()
    for _ in range(3):
        yield {"hand": random.randint(0, 10 ** 9), "route": route}

file, how = sys.argv[1:]
if how == "from_list":
    data = Dataset.from_list(list(rows(file)))
else:
    data = Dataset.from_generator(rows, gen_kwargs={"file": file}, keep_in_memory=how == "in memory")
print(data["hand"][0], data["route"][0], len(called), sep="|")
PYTHON
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version

print("datasets", version("datasets"))
folder, seen = sys.argv[1], []
for how in ("from_list", "from_generator", "in memory"):
    runs = []
    for route in ("left", "right"):  # the file is edited between the two runs
        with open(f"{folder}/{how}", "w") as f:
            f.write(route)
        command = [sys.executable, "-W", "ignore", f"{folder}/rows.py", f"{folder}/{how}", how]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(done.stdout.strip().split("|"))
    for hand, route, calls in runs:
        print(f"{how:15} hand {hand:>10}   route {route:5}   the generator was called {calls} times")
    seen.append([a == b for a, b in zip(*runs)])
expected = [[False, False, True], [True, True, False], [True, True, False]]
raise SystemExit(0 if seen == expected else f"the behaviour has changed: {seen}")
PYTHON
