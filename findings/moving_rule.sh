#!/usr/bin/env bash
# Guess: the system turn stays where it is, in front of the conversation. So the prompt of a second attempt begins with
#   the prompt of the first one, and all answers of a demonstration stand behind the rule.
# What happens: that hangs on the version of Mistral's tokenizer, for the same messages. v3 (Mistral Large 2407, Mixtral
#   8x22B) writes the system turn into the LAST user turn, in fine-tuning mode as well. With each attempt the rule moves
#   on, and the earlier turns lose it. v1 writes it into the first user turn, v7 (Large 2411) in front of all.
# Versions: mistral-common 1.13.1 with the tokenizers in its wheel, sentencepiece 0.2.3.
# Why it matters here: SFT on a conversation of several attempts would train all answers but the last with no rule in
#   front of them. In RL the next prompt does not begin with the ids that were sampled from, so no cache holds, and
#   PPO's ratio would compare two states. Put the rule into the first user turn, as this repository does, and check
#   that each prompt begins with the one before it.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile mistral-common==1.13.1 sentencepiece==0.2.3
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
from importlib.resources import files
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

turns = [SystemMessage(content="RULE"), UserMessage(content="HAND"), AssistantMessage(content="FIRST"),
         UserMessage(content="FEEDBACK"), AssistantMessage(content="SECOND")]
released = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3",
            "v7": "mistral_instruct_tokenizer_241114.model.v7"}

def encode(name, count, mode=ValidationMode.test):
    """The ids of the first `count` turns, and their text."""
    tokenizer = MistralTokenizer.from_file(str(files("mistral_common") / "data" / released[name]), mode=mode)
    ids = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=turns[:count])).tokens
    return ids, tokenizer.decode(ids, special_token_policy=SpecialTokenPolicy.KEEP)

print(*(f"{name} {version(name)}" for name in ("mistral-common", "sentencepiece")))
seen = {}
for name in released:
    prompts = [encode(name, 2), encode(name, 4)]
    _, trained = encode(name, 5, ValidationMode.finetuning)
    seen[name] = prompts[1][0][:len(prompts[0][0])] == prompts[0][0], trained.index("RULE") < trained.index("FIRST")
    for title, text in zip(("first prompt", "second prompt", "fine-tuning"), [text for _, text in prompts] + [trained]):
        print(f"{name} {title:14} {text!r}")
still = seen == {"v1": (True, True), "v3": (False, False), "v7": (True, True)}
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
