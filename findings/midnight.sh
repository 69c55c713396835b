#!/usr/bin/env bash
# Guess: the same messages and the same chat template give the same prompt, today and tomorrow, at least within one run.
# What happens: the templates of gpt-oss and Llama 3.2 write today's date into the first turn, and ask the clock at each
#   rendering. So the prompt of a second attempt does not begin with the prompt of the first one if midnight lies
#   between the two, and the same checkpoint has another greedy score on another day. For Llama 3.2 date_string= fixes
#   the day. gpt-oss takes no such option. Its system turn is no way out: it becomes the developer's, behind the date.
#   Without a system turn of one's own both write it, too.
# Versions: templates in the wheel of trl 1.16.0; transformers 5.24.0, Jinja2 3.1.6.
# Why it matters here: runs of days go through midnights. There a cache of prompts or of log-probabilities by prompt
#   misses, a resumed run is another one, and ids that were kept from the first turn stand before a turn that was
#   rendered for another day. SFT on demonstrations that were rendered once trains one day. Look for strftime_now in a
#   template, and put a fixed day in its place, as is done below.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 Jinja2==3.1.6
"$folder/venv/bin/pip" download -q --no-deps -d "$folder" trl==1.16.0
"$folder/venv/bin/python" -m zipfile -e "$folder"/trl-*.whl "$folder"
"$folder/venv/bin/python" - "$folder/trl/chat_templates" 2> >(grep -v "PyTorch was not found" >&2) <<'PYTHON'
import datetime, os, re, sys
import jinja2, transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

class Clock(datetime.datetime):
    """Stands in for the machine's clock, so that midnight need not be waited for."""
    @classmethod
    def now(cls):
        return cls(*moment)

chat_template_utils.datetime = Clock
tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), bos_token="<bos>")
first = [{"role": "system", "content": "RULE"}, {"role": "user", "content": "HAND"}]
second = first + [{"role": "assistant", "content": "FORMULA"}, {"role": "user", "content": "FEEDBACK"}]

print("transformers", transformers.__version__, "jinja2", jinja2.__version__, "templates of trl 1.16.0")
seen = {}
for name in ("llama3_2", "gptoss", "llama3", "qwen3"):
    with open(os.path.join(sys.argv[1], name + ".jinja"), encoding="utf-8") as f:
        released = f.read()
    fixed = re.sub(r"strftime_now\(.*?\)", "'26 Jul 2024'", released)
    for kind, template, options in (("as it is", released, {}), ("fixed", fixed, {}),
                                    ("date_string=", released, {"date_string": "26 Jul 2024"})):
        texts = []
        for moment, messages in (((2026, 11, 30, 23, 59), first), ((2026, 12, 1, 0, 1), second)):
            texts.append(tok.apply_chat_template(messages, chat_template=template, tokenize=False, **options))
        seen[name, kind] = texts[1].startswith(texts[0])
        dates = [*re.findall(r"(?:Today Date|Current date): (.*)", "\n".join(texts)), "-", "-"][:2]
        print(f"{name:8} {kind:12} {dates[0]:11} then {dates[1]:11} - second begins with first: {seen[name, kind]}")
broken = {key for key, begins in seen.items() if not begins}
raise SystemExit(0 if broken == {("llama3_2", "as it is"), ("gptoss", "as it is"), ("gptoss", "date_string=")}
                 else "the behaviour has changed")
PYTHON
