"""Verdicts of GenEval's own evaluate_image() on hand-made detections. Run in the old
environment, see README.md.

Only the detector and the colour classifier are replaced: they return what a case says.
Thresholds are GenEval's defaults. Detections are (class, score, x0, y0, x1, y1[,
colour]); scores of one class differ, since the original breaks ties in no defined
order.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import common
import numpy as np
import torch

A, B, C = (
    (10, 10, 60, 60),
    (100, 10, 150, 60),
    (10, 100, 60, 150),
)  # top left, top right, bottom left


def include(name, count=1, **more):
    return {"class": name, "count": count, **more}


def detections(name, boxes, scores, colors=()):
    """One class: boxes, scores and, for colour cases, what the classifier would say."""
    colors = list(colors) + [None] * (len(boxes) - len(colors))
    return [
        {"class": name, "score": s, "box": list(b), "color": c}
        for b, s, c in zip(boxes, scores, colors)  # noqa: B905
    ]


def cases():
    """(name, tag, include, exclude, detections)"""
    many = [(10 * i, 0, 10 * i + 9, 9) for i in range(20)]
    falling = [0.99 - 0.002 * i for i in range(20)]
    two = [include("cat"), include("dog")]
    left = [include("dog"), include("cat", position=["left of", 0])]
    above = [include("dog"), include("cat", position=["above", 0])]
    colors = [include("car", color="red")]
    attr = [include("car", color="red"), include("dog", color="brown")]
    three = [include("clock", 3)], [include("clock", 4)]
    row = (A, B, C, (100, 100, 150, 150))
    yield "single_found", "single_object", [include("cat")], [], detections("cat", [A], [0.8])
    yield "single_missing", "single_object", [include("cat")], [], detections("dog", [A], [0.8])
    yield "single_nothing", "single_object", [include("cat")], [], []
    yield "single_low_score", "single_object", [include("cat")], [], detections("cat", [A], [0.29])
    yield (
        "single_score_at_threshold",
        "single_object",
        [include("cat")],
        [],
        detections("cat", [A], [0.3]),
    )
    yield (
        "single_extra_instances",
        "single_object",
        [include("cat")],
        [],
        detections("cat", [A, B, C], [0.9, 0.8, 0.7]),
    )
    yield (
        "two_found",
        "two_object",
        two,
        [],
        detections("cat", [A], [0.8]) + detections("dog", [B], [0.5]),
    )
    yield "two_one_missing", "two_object", two, [], detections("cat", [A], [0.8])
    yield "two_both_missing", "two_object", two, [], []
    yield "counting_exact", "counting", *three, detections("clock", row[:3], [0.99, 0.95, 0.91])
    yield "counting_too_few", "counting", *three, detections("clock", row[:2], [0.99, 0.95])
    yield (
        "counting_one_below_0.9",
        "counting",
        *three,
        detections("clock", row[:3], [0.99, 0.95, 0.89]),
    )
    yield "counting_at_0.9", "counting", *three, detections("clock", row[:3], [0.99, 0.95, 0.9])
    yield (
        "counting_too_many",
        "counting",
        *three,
        detections("clock", row, [0.99, 0.98, 0.97, 0.96]),
    )
    yield (
        "counting_extra_below_0.9",
        "counting",
        *three,
        detections("clock", row, [0.99, 0.98, 0.97, 0.7]),
    )
    yield (
        "counting_at_most_16",
        "counting",
        [include("bird", 17)],
        [],
        detections("bird", many, falling),
    )
    yield "color_right", "colors", colors, [], detections("car", [A], [0.8], ["red"])
    yield "color_wrong", "colors", colors, [], detections("car", [A], [0.8], ["blue"])
    yield (
        "color_only_best_counts",
        "colors",
        colors,
        [],
        detections("car", [A, B], [0.6, 0.9], ["red", "blue"]),
    )
    yield "color_missing_object", "colors", colors, [], []
    yield (
        "color_two_of_two",
        "colors",
        [include("car", 2, color="red")],
        [],
        detections("car", [A, B], [0.6, 0.9], ["red", "red"]),
    )
    yield (
        "color_one_of_two",
        "colors",
        [include("car", 2, color="red")],
        [],
        detections("car", [A, B], [0.6, 0.9], ["red", "pink"]),
    )
    yield (
        "position_left",
        "position",
        left,
        [],
        detections("dog", [B], [0.8]) + detections("cat", [A], [0.7]),
    )
    yield (
        "position_mirrored",
        "position",
        left,
        [],
        detections("dog", [A], [0.8]) + detections("cat", [B], [0.7]),
    )
    yield (
        "position_above",
        "position",
        above,
        [],
        detections("dog", [C], [0.8]) + detections("cat", [A], [0.7]),
    )
    yield (
        "position_beside_not_above",
        "position",
        above,
        [],
        detections("dog", [B], [0.8]) + detections("cat", [A], [0.7]),
    )
    yield (
        "position_dead_zone",
        "position",
        left,
        [],
        detections("dog", [(18, 10, 68, 60)], [0.8]) + detections("cat", [A], [0.7]),
    )
    yield (
        "position_diagonal",
        "position",
        left,
        [],
        detections("dog", [row[3]], [0.8]) + detections("cat", [A], [0.7]),
    )
    yield (
        "position_same_place",
        "position",
        left,
        [],
        detections("dog", [A], [0.8]) + detections("cat", [A], [0.7]),
    )
    yield (
        "position_shallow_angle",
        "position",
        above,
        [],
        detections("dog", [(100, 50, 150, 100)], [0.8]) + detections("cat", [A], [0.7]),
    )
    yield (
        "position_shrunk_below_half",
        "position",
        left,
        [],
        detections("dog", [(28, 10, 78, 60)], [0.8]) + detections("cat", [A], [0.7]),
    )
    yield "position_no_target", "position", left, [], detections("cat", [A], [0.7])
    yield "position_no_subject", "position", left, [], detections("dog", [A], [0.7])
    yield (
        "position_only_best_counts",
        "position",
        left,
        [],
        detections("dog", [B], [0.8]) + detections("cat", [A, (160, 10, 200, 50)], [0.5, 0.9]),
    )
    yield (
        "attr_right",
        "color_attr",
        attr,
        [],
        detections("car", [A], [0.8], ["red"]) + detections("dog", [B], [0.7], ["brown"]),
    )
    yield (
        "attr_swapped",
        "color_attr",
        attr,
        [],
        detections("car", [A], [0.8], ["brown"]) + detections("dog", [B], [0.7], ["red"]),
    )
    yield (
        "attr_one_wrong",
        "color_attr",
        attr,
        [],
        detections("car", [A], [0.8], ["red"]) + detections("dog", [B], [0.7], ["white"]),
    )
    yield "attr_one_missing", "color_attr", attr, [], detections("car", [A], [0.8], ["red"])
    yield "exclude_only", "counting", [], [include("cat", 1)], detections("cat", [A], [0.95])


def main() -> None:
    options = common.arguments(__doc__)
    common.stub("mmdet", "mmdet.apis", "open_clip", "clip_benchmark", "clip_benchmark.metrics")
    common.sys.path.insert(0, str(options.source / "evaluation"))
    available, torch.cuda.is_available = (
        torch.cuda.is_available,
        lambda: True,
    )  # the script asserts a GPU on import
    import evaluate_images as original

    torch.cuda.is_available = available
    original.object_detector = None
    original.THRESHOLD, original.COUNTING_THRESHOLD, original.MAX_OBJECTS = 0.3, 0.9, 16
    original.NMS_THRESHOLD, original.POSITION_THRESHOLD = 1.0, 0.1
    original.classnames = (
        (options.source / "evaluation" / "object_names.txt").read_text().split("\n")[:80]
    )
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "image.png"
        common.PIL.Image.new("RGB", (224, 224)).save(file)
        for name, tag, included, excluded, found in cases():
            metadata = {"tag": tag, "include": included, "prompt": name}
            if excluded:
                metadata["exclude"] = excluded
            original.inference_detector = lambda model, path, found=found: [
                np.array(
                    [[*d["box"], d["score"]] for d in found if d["class"] == c], dtype=np.float32
                ).reshape(-1, 5)
                for c in original.classnames
            ]
            color_of = {(d["class"], *map(float, d["box"])): d["color"] for d in found}
            original.color_classification = lambda image, boxes, classname, color_of=color_of: [
                color_of[(classname, *map(float, box[:4]))] for box, _ in boxes
            ]
            result = original.evaluate_image(str(file), metadata)
            kept = {
                key: [[round(v, 4) for v in box] for box in boxes]
                for key, boxes in json.loads(result["details"]).items()
            }
            results.append(
                {
                    "name": name, "metadata": metadata, "detections": found,
                    "correct": bool(result["correct"]),
                    "reason": result["reason"], "kept": kept,
                }
            )  # fmt: skip
    note = (
        "evaluate_image() with default thresholds; detector and colour classifier stubbed. Two "
        "relations in a reason come in any order"
    )
    numbers = {
        "source": common.source_of(options.source, "djghosh13/geneval", "pandas", note=note),
        "cases": results,
    }
    numbers["object_names"] = original.classnames
    common.write(options.out, "geneval", numbers)
    for r in results:
        print(r["name"], r["correct"], r["reason"].replace("\n", " | "))


if __name__ == "__main__":
    main()
