"""Models over guidance scales: the best scale is chosen on one half of the prompts and
reported on the other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign import cli, compare, compare_guidance
from diffalign.config.ranges import read_scales
from diffalign.data.prompt_sets import load_prompts
from diffalign.errors import ConfigError
from diffalign.evaluation.comparison import Comparison
from diffalign.evaluation.guidance_curves import GuidanceCurves, model_name
from diffalign.evaluation.guidance_report import headline, page, picture_of
from diffalign.evaluation.models import ModelSpec, parse_model
from diffalign.evaluation.statistics import win_rate

SCALES = [1.0, 3.0, 7.0]
QUICK: dict[str, Any] = {"max_prompts": 4, "num_images": 1, "num_inference_steps": 2}


def curves_of(
    means: dict[str, list[float]], prompts: int = 24, higher: bool = True, images: int = 2
) -> GuidanceCurves:
    """Curves with given mean scores of every model at every scale."""
    rng = np.random.default_rng(0)
    arms = [ModelSpec(name, "shapes") for name in means]
    noise = rng.normal(0, 0.02, (prompts, images))
    scores = {
        model_name(arm, scale): {
            "scorer": (1 if higher else -1) * (value + noise + rng.normal(0, 0.01, noise.shape))
        }
        for arm, values in means.items()
        for scale, value in zip(SCALES, values, strict=True)
    }
    texts = [f"prompt {i}" for i in range(prompts)]
    models = [ModelSpec(name, "shapes") for name in scores]
    spread = {name: np.full(prompts, 0.1 * i) for i, name in enumerate(scores)}
    facts = {"settings": {"seed": 0, "arguments": {}}}
    comparison = Comparison(
        models, load_prompts(texts), images, scores, {"scorer": higher}, spread, "pixel",
        Path("nowhere"), facts,
    )  # fmt: skip
    return GuidanceCurves(comparison, arms, SCALES)


@pytest.mark.parametrize("higher", [True, False])
def test_each_model_is_compared_at_its_own_best(higher: bool) -> None:
    curves = curves_of({"base": [0.1, 0.5, 0.9], "tuned": [0.8, 0.7, 0.2]}, higher=higher)
    assert curves.best("base") == 7.0 and curves.best("tuned") == 1.0
    # At guidance 1 and 3 the tuned model wins, at each one's best it loses.
    assert curves.win_rate_at("tuned", 1.0).rate == curves.win_rate_at("tuned", 3.0).rate == 1.0
    assert curves.win_rate("tuned").rate == 0.0 and curves.sign_test("tuned") < 1e-3
    mean, low, high = curves.gain("tuned")
    assert low < mean < high < 0 and mean == pytest.approx(-0.1, abs=0.01)
    assert "tuned at guidance 1 loses against base at 7" in headline(curves)


def test_tuned_models_are_compared_with_each_other_at_their_best() -> None:
    curves = curves_of({"base": [0.1, 0.5, 0.9], "a": [0.8, 0.7, 0.2], "b": [0.2, 0.6, 0.1]})
    assert curves.win_rate("a", against="b").rate == 1.0
    content = curves.to_dict()["between"]
    assert content["a"]["b"]["scorer"]["rate"] == 1.0
    assert content["b"]["a"]["scorer"]["rate"] == 0.0
    table = curves.table()
    assert "Against each other, win-rate % of the row by scorer" in table
    assert re.search(r"\| a \|  \| 100\.0 \(.*\) \|", table), table
    assert "The first two tables are of the other 12" in table
    two = curves_of({"base": [0.1, 0.5, 0.9], "a": [0.8, 0.7, 0.2]})
    assert "Against each other" not in two.table() and "between" not in two.to_dict()


def test_few_prompts_win_nothing_by_the_interval_alone() -> None:
    from diffalign.evaluation.report import headline as plain_headline

    curves = curves_of({"base": [0.5, 0.5, 0.5], "tuned": [0.6, 0.6, 0.6]}, prompts=8)
    assert curves.comparison.win_rate(model_name("tuned", 1.0)).verdict == 1
    assert curves.sign_test("tuned") > 0.05  # four prompts report
    assert "tuned at guidance" in headline(curves) and "no significant difference" in headline(
        curves
    )
    assert "wins: 100.0" in plain_headline(curves.comparison)  # eight of eight do


def test_the_half_that_chooses_is_not_the_half_that_reports() -> None:
    curves = curves_of({"base": [0.5, 0.5, 0.5], "tuned": [0.4, 0.6, 0.5]})
    tuned = curves.comparison.scores[model_name("tuned", 1.0)]["scorer"]
    tuned[::2] += 5  # luck on the prompts that choose
    assert curves.best("tuned") == 1.0
    base, lucky = curves.at_best("base"), curves.at_best("tuned")
    assert len(base) == len(lucky) == 12 and lucky.mean() < 0.5
    assert curves.win_rate("tuned") == win_rate(base, tuned[1::2])
    # What only the second half holds does not choose.
    curves.comparison.scores[model_name("base", 7.0)]["scorer"][1::2] += 5
    assert curves.best("base") == curves_of({"base": [0.5] * 3, "tuned": [0.4] * 3}).best("base")


def test_equal_scales_and_missing_scores() -> None:
    curves = curves_of({"base": [0.5, 0.5, 0.5], "tuned": [0.5, 0.5, 0.5]})
    for scale in SCALES:
        curves.comparison.scores[model_name("tuned", scale)]["scorer"][:] = 0.5
    assert curves.best("tuned") == 1.0  # of equal ones the smallest
    curves.comparison.scores[model_name("tuned", 1.0)]["scorer"][:] = np.nan
    assert curves.best("tuned") == 3.0
    values = json.loads(json.dumps(curves.to_dict(), allow_nan=False))
    assert values["models"]["tuned"]["scores"]["scorer"]["1"]["mean"] is None
    picture_of(curves)
    for scale in SCALES:
        curves.comparison.scores[model_name("tuned", scale)]["scorer"][:] = np.nan
    assert curves.best("tuned") == 1.0 and np.isnan(curves.win_rate("tuned").rate)
    picture_of(curves)


def test_the_picture_is_whole_and_texts_are_escaped() -> None:
    curves = curves_of({"base": [0.1, 0.5, 0.9], "tuned": [0.8, 0.7, 0.2], "b": [0.1, 0.2, 0.1]})
    root = ElementTree.fromstring(picture_of(curves))
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 2 * 3  # two panels, three models
    for line in lines:
        points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
        assert len(points) == 3 and all(0 <= x < width and 0 <= y < height for x, y in points)
    best = [e for e in root.iter() if e.tag.endswith("circle") and e.attrib["r"] == "6"]
    assert len(best) == 2 * 3
    single = curves_of({"base": [0.1, 0.5, 0.9], "tuned": [0.8, 0.7, 0.2]}, images=1)
    for name in single.comparison.diversity:
        single.comparison.diversity[name][:] = np.nan
    assert picture_of(single).count("<polyline") == 2  # no diversity, no second panel
    curves.comparison.higher_is_better["<b>"] = curves.comparison.higher_is_better.pop("scorer")
    for scores in curves.comparison.scores.values():
        scores["<b>"] = scores.pop("scorer")
    assert "<b>" not in page(curves) and "&lt;b&gt;" in page(curves)


@pytest.mark.parametrize(
    "scales", [[], [3], [3, 3.0], [1, float("nan")], [1, True], ["1", "3"], "1,3", None, 3]
)
def test_scales_that_are_no_scales(scales: Any) -> None:
    with pytest.raises(ConfigError, match="guidance_scales: expected at least two different"):
        read_scales(scales)


def test_scales_are_sorted_and_distinct() -> None:
    assert read_scales((5, 1, 5.0, 2.5)) == [1.0, 2.5, 5.0]


def test_a_model_may_have_a_guidance_of_its_own() -> None:
    spec = parse_model("{model: shapes, guidance_scale: 4}", "tuned")
    assert spec.guidance_scale == 4.0 and spec.described == "shapes, guidance 4"
    assert spec.fingerprint() != parse_model("shapes", "tuned").fingerprint()
    with pytest.raises(ConfigError, match="tuned.guidance_scale: expected a number, got 'high'"):
        parse_model({"model": "shapes", "guidance_scale": "high"}, "tuned")


def test_mistakes_are_found_before_anything_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, match in (
        ({"guidance_scale": 3.0}, "guidance_scale: it cannot be combined with guidance_scales"),
        ({"guidance_scales": [3]}, "guidance_scales: expected at least two"),
        ({"max_prompts": 3}, "prompts: expected at least .* prompts, got 3: one half chooses"),
    ):
        with pytest.raises(ConfigError, match=match):
            compare_guidance("shapes", "b=shapes", output_dir=out, **{**QUICK, **options})
    with pytest.raises(ConfigError, match="b.guidance_scale: it cannot be combined"):
        compare_guidance(
            "shapes", {"name": "b", "model": "shapes", "guidance_scale": 2}, output_dir=out
        )
    assert not out.exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [
        "compare", "--tuned", "again=shapes", "--guidance_scales", "3,1", "--max_prompts", "4",
        "--num_images", "2", "--num_inference_steps", "2", "--output_dir", str(out),
    ]  # fmt: skip
    assert cli.run(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Each at its best guidance, against base at [13]\*\*", printed)
    assert "| again | " in printed and "50.0 (50.0 to 50.0)" in printed
    names = {p.name for p in out.iterdir()}
    assert {"grid.png", "guidance.svg", "report.html", "results.json", "table.md"} <= names
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    assert {(r["arm"], r["guidance_scale"]) for r in rows} == {
        (arm, scale) for arm in ("base", "again") for scale in (1.0, 3.0)
    }
    # The images at a scale are those of a plain comparison at this scale.
    plain = compare(
        "shapes", "again=shapes", output_dir=tmp_path / "plain", max_prompts=4, num_images=2,
        num_inference_steps=2, guidance_scale=3.0,
    )  # fmt: skip
    for p in range(4):
        curve_image = Image.open(out / "images" / "base@g3" / f"{p:05d}-001.png")
        assert curve_image.tobytes() == Image.open(plain.file("base", p, 1)).tobytes()
    # A second call draws nothing, a further scale only its own images.
    times = {p: p.stat().st_mtime_ns for p in out.rglob("images/**/*.png")}
    assert cli.run(arguments) == 0
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("images/**/*.png")}
    arguments[arguments.index("3,1")] = "3,1,2"
    assert cli.run(arguments) == 0
    assert len(list(out.rglob("images/**/*.png"))) == 1.5 * len(times)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    # Another comparison does not go on in this folder.
    assert cli.run(["compare", "--tuned", "again=shapes", "--output_dir", str(out)]) == 2


def test_mistakes_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for more, message in (
        (["--guidance_scales", "1,x"], "--guidance_scales: expected comma-separated numbers"),
        (["--guidance_scales", "2"], "--guidance_scales: expected at least two different numbers"),
        (["--guidance_scales", ""], "--guidance_scales: expected at least two different numbers"),
        (
            ["--guidance_scales", "1,2", "--guidance_scale", "2"],
            "--guidance_scale: it cannot be combined with --guidance_scales",
        ),
    ):
        assert cli.run(["compare", "--tuned", "shapes", *more]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
