#!/usr/bin/env bash
# Guess: picture.resize(size, Image.LANCZOS) and picture.thumbnail(size) shrink smoothly, whatever the picture's mode.
# What happens: in the modes "P" and "1" both take the nearest pixel, also where LANCZOS is asked for, and say nothing.
#   Of a chart with thin lines some lines stay and the others are gone, while the same pixels in RGB keep all of them in
#   grey. A line that moves by one pixel appears or disappears. convert("RGB") behind the resize is too late.
# Versions: Pillow 13.0.0.
# Why it matters here: charts, maps and screenshots on the web are often PNGs with a palette, and these open in mode
#   "P". A vision-language model would be asked, and paid, for what its picture does not show; and a set that was saved
#   as JPEG is another one, as JPEG has no palette. Convert to RGB before shrinking. This repository draws in RGB.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile pillow==13.0.0
"$folder/venv/bin/python" -W error - "$folder/chart.png" <<'PYTHON'
import sys
import PIL
from PIL import Image, ImageDraw

places = [20 + 29 * i for i in range(12)]  # of 12 vertical lines, one pixel wide
chart = Image.new("RGB", (360, 40), "white")
for x in places:
    ImageDraw.Draw(chart).line([(x, 0), (x, 39)], fill="black")
chart.quantize(2).save(sys.argv[1])

def lines(picture):
    """How dark a row of the picture is at each line: 255 is black, 0 is gone."""
    row = [255 - picture.convert("L").getpixel((x, 5)) for x in range(picture.width)]
    return [max(row[max(0, x // 4 - 1):x // 4 + 2]) for x in places]

def thumbnail(picture, size):
    picture = picture.copy()
    picture.thumbnail(size, Image.LANCZOS)
    return picture

print("Pillow", PIL.__version__)
seen = {}
with Image.open(sys.argv[1]) as opened:
    opened.load()
    same = opened.convert("RGB").tobytes() == chart.tobytes()
    print("mode of the file:", opened.mode, "- its pixels are the chart's:", same)
    for name, picture in (("P", opened), ("1", chart.convert("1")), ("RGB", opened.convert("RGB"))):
        for shrink in (lambda p, size: p.resize(size, Image.LANCZOS), thumbnail):
            small = shrink(picture, (90, 10))
            seen.setdefault(name, []).append(lines(small))
        print(f"{name:4} a quarter of the size: darkness at 12 lines {seen[name][0]}, "
              f"lines left {sum(x > 0 for x in seen[name][0])}; by thumbnail() {sum(x > 0 for x in seen[name][1])}")
left = {name: [sum(x > 0 for x in row) for row in rows] for name, rows in seen.items()}
still = same and left["RGB"] == [12, 12] and max(left["P"] + left["1"]) < 6
raise SystemExit(0 if still else "the behaviour has changed")
PYTHON
