#!/usr/bin/env bash
# Guess: a PIL picture that goes into a datasets.Dataset is stored as it is at that moment.
# What happens: a picture that came from Image.open() still knows its file, and of such a picture only the path is
#   stored. Methods that work in place leave the file name: thumbnail(), paste(), putpixel() and all of ImageDraw.
#   Their work is lost without a word, and what comes back is the file: of its full size, without what was drawn.
#   Methods that give a new picture, such as resize(), convert() and copy(), forget the name, and their work is kept.
#   So "shrink by thumbnail()" and "shrink by resize()" make different training sets. map() stores in the same way.
# Versions: datasets 5.2.0 with pyarrow 26.0.1, Pillow 13.0.0.
# Why it matters here: thumbnail() before SFT bounds a picture's tokens, and a box over the answer hides it. Behind
#   such a Dataset the pictures are large again, and the answer can be read. Give it picture.copy(), and look at one
#   that comes out. This repository keeps pictures out of Arrow.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile datasets==5.2.0 pyarrow==26.0.1 pillow==13.0.0
HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HOME="$folder" "$folder/venv/bin/python" - "$folder/white.png" <<'PYTHON'
import sys
import datasets, PIL, pyarrow
from PIL import Image, ImageDraw

file = sys.argv[1]
Image.new("RGB", (400, 300), "white").save(file)
black = {"fill": "black"}
edits = {  # each shrinks the picture, or makes its upper left corner black
    "thumbnail()": lambda im: im.thumbnail((40, 30)),
    "ImageDraw": lambda im: ImageDraw.Draw(im).rectangle((0, 0, 9, 9), **black),
    "paste()": lambda im: im.paste("black", (0, 0, 9, 9)), "putpixel()": lambda im: im.putpixel((0, 0), (0, 0, 0)),
    "resize()": lambda im: im.resize((40, 30)), "crop()": lambda im: im.crop((0, 0, 40, 30))}

def state(im):
    return im.size, "black" if im.getpixel((0, 0)) == (0, 0, 0) else "white"

print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__, "Pillow", PIL.__version__)
lost = {}
for name, edit in edits.items():
    picture = Image.open(file)
    picture = edit(picture) or picture
    out = datasets.Dataset.from_list([{"image": picture}])[0]["image"]
    mapped = datasets.Dataset.from_list([{"n": 1}]).map(lambda row: {"image": picture})[0]["image"]
    copied = datasets.Dataset.from_list([{"image": picture.copy()}])[0]["image"]
    lost[name] = [state(x) != state(picture) for x in (out, mapped, copied)]
    print(f"{name:12} in: {state(picture)}, out: {state(out)}, by map(): {state(mapped)}, copy(): {state(copied)}")
wanted = {name: [name not in ("resize()", "crop()")] * 2 + [False] for name in edits}
raise SystemExit(0 if lost == wanted else "the behaviour has changed")
PYTHON
