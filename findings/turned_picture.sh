#!/usr/bin/env bash
# Guess: albumentations turns a keypoint's angle with its picture, whichever of its transforms turns it. A.Rotate by 90
#   degrees and the quarter turn of A.RandomRotate90 give the same pixels and the same place, so the same angle.
# What happens: the two angles are 180 degrees apart. Its guide counts angles counter-clockwise. Rotate, SafeRotate,
#   Affine and the flips do: what a keypoint looks at it still looks at. In the quarter turns of RandomRotate90 and
#   D4 it then looks the other way, for they count clockwise, and half turns fit both. Transpose is wrong for angles up
#   to 180 and right above. With clockwise angles the others are wrong: no way of counting fits all. Nothing warns.
# Versions: albumentations 2.0.8 with opencv-python-headless 5.0.0.93 and numpy 2.4.6.
# Why it matters here: a heading on a map, or the way a car or an arrow points, is such an angle. RandomRotate90(p=1)
#   makes half of the labels say the opposite, the places stay right, and a check by a flip or a Rotate passes. Give a
#   second keypoint, a point ahead, and compute the angle behind the transform. env_virl.py draws each view for its
#   heading and turns no picture.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q albumentations==2.0.8 opencv-python-headless==5.0.0.93 numpy==2.4.6
NO_ALBUMENTATIONS_UPDATE=1 "$folder/venv/bin/python" - <<'PYTHON'
import math
import albumentations as A
import numpy as np

picture = np.random.default_rng(0).integers(0, 256, (101, 101, 3), dtype=np.uint8)
x, y, angles = 60, 40, (30, 120, 210, 300)  # counter-clockwise from the right: 30 looks to the right and a bit up

def errors(transform, seed=0):
    """The new picture, the keypoint's new place, and its angle less that of a point ahead, for each of the angles."""
    found = []
    for angle in angles:
        ahead = x + 20 * math.cos(math.radians(angle)), y - 20 * math.sin(math.radians(angle))
        compose = A.Compose([transform], keypoint_params=A.KeypointParams("xya"), seed=seed)
        result = compose(image=picture, keypoints=[(x, y, angle), (*ahead, 0)])
        (x1, y1, new), (x2, y2, _) = result["keypoints"]
        found.append(round(new - math.degrees(math.atan2(y1 - y2, x2 - x1))) % 360)
    return result["image"], (round(float(x1)), round(float(y1))), found

print("albumentations", A.__version__, "- error of the angles", *angles)
seen = {}
def show(name, *result):
    seen[name] = result[-1]
    print(f"{name:28} place {result[1]}: {result[-1]}")

for turns in (1, 2, 3):
    fixed = errors(A.Rotate((90 * turns, 90 * turns), p=1))
    show(f"Rotate by {90 * turns}", *fixed)
    for kind in (A.RandomRotate90, A.D4):
        drawn = next(d for d in (errors(kind(p=1), s) for s in range(99)) if np.array_equal(d[0], fixed[0]))
        assert drawn[1] == fixed[1]  # the same pixels and the same place
        show(f"{kind.__name__}, {turns} x 90", *drawn)
for name, transform in {"SafeRotate by 30": A.SafeRotate((30, 30), p=1), "Affine by 30": A.Affine(rotate=(30, 30), p=1),
                        "HorizontalFlip": A.HorizontalFlip(p=1), "Transpose": A.Transpose(p=1)}.items():
    show(name, *errors(transform))
wanted = {name: [0] * 4 for name in seen}
for turns in (1, 3):
    wanted |= {f"{kind}, {turns} x 90": [180] * 4 for kind in ("RandomRotate90", "D4")}
wanted["Transpose"] = [180, 180, 0, 0]
raise SystemExit(0 if seen == wanted else "the behaviour has changed")
PYTHON
