#!/usr/bin/env bash
# Guess: of an answer with several JSON objects json_repair.loads() always gives the same kind of thing: the first one,
#   the last one, or a list of all.
# What happens: an object replaces the one before it if both have the same keys and their values have the same types.
#   Else both go into a list. So a draft and its correction give a dict, and a list if the one says 24 and the other
#   24.0, if only one has a further key, or if a comma follows the first one. Brackets in the words around are an
#   element, too: "the cards [2, 3, 4, 6]" makes a list of an answer with one object.
# Versions: json-repair 0.64.6.
# Why it matters here: loads(answer)["value"] passes a test with one object and one with a corrected draft. Behind
#   others it raises, and a reward that counts this as an illegal answer punishes a model for naming its cards. Search
#   the text for objects and take the last one, as verifier.py's last_json_object() does, or ask which type came.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q json-repair==0.64.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
import json_repair

print("json-repair", version("json-repair"))
answers = {'{"value": 24}': dict, 'First {"value": 23}. No: {"value": 24}': dict,
           'First {"value": 23.5}. No: {"value": 24}': list, 'First {"value": 23}. No: {"value": 24, "cards": 4}': list,
           'Of the cards [2, 3, 4, 6] I make {"value": 24}': list, '{"value": 23} or {"value": 24}': dict,
           '{"value": 23}, or {"value": 24}': list}
seen = {}
for answer in answers:
    found = json_repair.loads(answer)
    seen[answer] = type(found)
    print(f"{answer:55} {type(found).__name__:5} {found}")
raise SystemExit(0 if seen == answers else "the behaviour has changed")
PYTHON
