"""`diffalign score`: folders, datasets, missing scores, resuming, several processes,
and mistakes."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import TORCHRUN
from PIL import Image

from diffalign import load_preferences, load_scorer
from diffalign.cli import score as score_command
from diffalign.cli.entry import Parser
from diffalign.cli.results import add_result_arguments, run_and_print
from diffalign.errors import UserError
from diffalign.rewards.registry import register_scorer
from diffalign.shapes import render, split_scenes

SCENES = split_scenes()[0][:12]
SCRIPT = Path(__file__).parents[2] / "scripts" / "score.py"
CALLS: list[int] = []

OWN_SCORER = '''
import os
import signal

def logged(images, prompts):
    """Width and length; says what it does in a file, and dies on demand."""
    with open(os.environ["SCORE_LOG"], "a") as log:
        log.write(f"{len(images)}\\n")
    if len(open(os.environ["SCORE_LOG"]).readlines()) == int(os.environ.get("SCORE_DIES_AT", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    return [image.getpixel((0, 0))[0] / 7 + len(prompt) for image, prompt in zip(images, prompts)]
'''


@register_scorer("score-brightness", requires=("image",))
def brightness(images):
    """Mean of the pixels."""
    CALLS.append(len(images))
    return [float(np.asarray(image.convert("RGB")).mean()) for image in images]


@register_scorer("score-dark", requires=("image",), higher_is_better=False)
def dark(images):
    """Mean of the pixels, lower is better."""
    return [float(np.asarray(image.convert("RGB")).mean()) for image in images]


def score(*arguments: object) -> int:
    parser = Parser()
    score_command.add_arguments(parser)
    add_result_arguments(parser)
    options = parser.parse_args([str(argument) for argument in arguments])
    return run_and_print(score_command.run, options)


def table(folder: Path) -> dict[str, list]:
    return pq.read_table(folder / "scores.parquet").to_pydict()


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def errors(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def image_folder(folder: Path, count: int = 6) -> Path:
    """Images whose prompts, beside them, are those of every second scene, so that each
    prompt has two."""
    folder.mkdir(parents=True)
    for i in range(count):
        render(SCENES[i], random.Random(i)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(SCENES[i // 2 * 2].prompt + "\n")
    return folder


def pair_table(path: Path, count: int = 6) -> Path:
    """Pairs whose chosen image shows its prompt; stored as bytes."""
    cells = [{"bytes": png(render(scene)), "path": None} for scene in SCENES[: count + 1]]
    rows = [
        {"prompt": SCENES[i].prompt, "chosen": cells[i], "rejected": cells[i + 1]}
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(autouse=True)
def _fresh():
    CALLS.clear()


def test_a_folder_with_captions_beside_the_images(tmp_path, capsys):
    folder = image_folder(tmp_path / "images")
    assert (
        score(
            "--images",
            folder,
            "--scorers",
            "shapes,score-brightness",
            "--output_dir",
            tmp_path / "out",
            "--chunk_size",
            4,
        )
        == 0
    )
    found = table(tmp_path / "out")
    assert list(found) == [
        "image",
        "row",
        "position",
        "role",
        "prompt",
        "shapes",
        "score-brightness",
        "combined",
    ]
    assert found["image"] == [f"{i:02d}.png" for i in range(6)] and found["row"] == list(range(6))
    prompts = [SCENES[i // 2 * 2].prompt for i in range(6)]
    assert found["prompt"] == prompts
    files = [folder / name for name in found["image"]]
    assert found["shapes"] == load_scorer("shapes")(files, prompts).tolist()
    assert found["score-brightness"] == load_scorer("score-brightness")(files).tolist()
    facts = summary(tmp_path / "out")
    assert facts["images"] == 6 and facts["groups"] == 3 and errors(tmp_path / "out") == []
    values = np.asarray(found["shapes"])
    statistics = facts["scorers"]["shapes"]
    assert (statistics["n"], statistics["missing"], statistics["max"]) == (6, 0, values.max())
    assert statistics["mean"] == pytest.approx(values.mean()) and statistics[
        "median"
    ] == pytest.approx(np.median(values))
    assert set(facts["agreement"]) == {"names", "kendalls_w", "pairwise", "left_out"}
    printed = capsys.readouterr().out
    assert (
        "6 images in 3 groups" in printed
        and "Kendall's W" in printed
        and "score-brightness" in printed
    )


def test_prompts_from_tables_files_and_the_command_line(tmp_path):
    folder = image_folder(tmp_path / "images", 3)
    for text in folder.glob("*.txt"):
        text.unlink()
    wanted = [scene.prompt for scene in SCENES[:3]]
    rows = [
        json.dumps({"file_name": f"{i:02d}.png", "prompt": prompt})
        for i, prompt in enumerate(wanted)
    ]
    (tmp_path / "lines.txt").write_text("\n".join(wanted))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n\n")
    run = ["--images", folder, "--scorers", "shapes", "--output_dir", tmp_path / "out"]
    for more in (["--prompts", tmp_path / "lines.txt"], ["--prompts", tmp_path / "rows.jsonl"]):
        score(*run, *more)
        assert table(tmp_path / "out")["prompt"] == wanted
    score(*run, "--prompt", wanted[1])
    assert table(tmp_path / "out")["prompt"] == [wanted[1]] * 3
    for name, content in (
        ("captions.json", json.dumps({f"{i:02d}": prompt for i, prompt in enumerate(wanted)})),
        ("prompts.jsonl", "\n".join(rows)),
        ("metadata.jsonl", "\n".join(row.replace("prompt", "text") for row in rows)),
    ):
        (folder / name).write_text(content)
        score(*run)
        assert table(tmp_path / "out")["prompt"] == wanted
        (folder / name).unlink()
    score(
        "--images",
        folder / "01.png",
        "--prompt",
        wanted[1],
        "--scorers",
        "shapes",
        "--output_dir",
        tmp_path / "one",
    )
    assert table(tmp_path / "one")["image"] == ["01.png"]


def test_metadata_reach_scorers_that_ask_for_them(tmp_path):
    @register_scorer("score-metadata", requires=("image", "metadata"), override=True)
    def by_metadata(images, prompts, metadata):
        return [row["count"] for row in metadata]

    folder = image_folder(tmp_path / "images", 3)
    run = ["--images", folder, "--scorers", "score-metadata", "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match="score-metadata needs metadata"):
        score(*run)
    lines = [
        json.dumps({"file_name": f"{i:02d}.png", "prompt": "x", "count": i + 5}) for i in range(3)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    score(*run)
    assert table(tmp_path / "out")["score-metadata"] == [5.0, 6.0, 7.0]


def test_pairs_say_how_often_the_chosen_image_wins(tmp_path, capsys):
    out = tmp_path / "out"
    score(
        "--images",
        pair_table(tmp_path / "pairs.parquet"),
        "--scorers",
        "shapes,score-dark",
        "--output_dir",
        out,
    )
    found = table(out)
    assert found["role"] == ["chosen", "rejected"] * 6 and found["position"] == [0, 1] * 6
    assert found["row"] == [i // 2 for i in range(12)] and found["image"][:2] == [
        "row 0, image 0",
        "row 0, image 1",
    ]
    facts = summary(out)
    assert facts["kind"] == "pair" and facts["rows"] == 6
    assert facts["scorers"]["shapes"]["agrees_with_labels"] == 1.0
    darker = [found["score-dark"][i] < found["score-dark"][i + 1] for i in range(0, 12, 2)]
    assert facts["scorers"]["score-dark"]["agrees_with_labels"] == pytest.approx(np.mean(darker))
    agree = [0.5 * (1 + shade) for shade in darker]  # both prefer the chosen one, or they differ
    assert found["combined"][::2] == pytest.approx(agree)
    assert facts["agreement"]["pairwise"][0][1] == pytest.approx(np.mean(darker))
    assert "chosen>rejected" in capsys.readouterr().out


def test_the_best_images_of_a_dataset_are_a_dataset(tmp_path, capsys):
    def cell(level):
        return {"bytes": png(Image.new("RGB", (8, 8), (level,) * 3)), "path": None}

    # As in Pick-a-Pic, a winner stays for the next pair.
    levels = [("dusk", 90, 10), ("dusk", 90, 50), ("dawn", 70, 90), ("dawn", 20, 30)]
    rows = [{"prompt": p, "chosen": cell(a), "rejected": cell(b)} for p, a, b in levels]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    given = ("--images", tmp_path / "pairs.parquet", "--scorers", "score-brightness")
    out = tmp_path / "out"
    assert score(*given, "--output_dir", out, "--best", 3, "--chunk_size", 2) == 0
    found = pq.read_table(out / "best").to_pylist()
    assert [(row["prompt"], row["score-brightness"]) for row in found] == [
        ("dusk", 90.0),
        ("dawn", 70.0),
        ("dawn", 90.0),
    ]
    assert found[0]["source"] == "row 0, image 0"
    assert "3 best images of 2 prompts" in capsys.readouterr().out
    data = load_preferences(str(out / "best"), verbose=False)
    assert (data.kind, len(data), data[0].open_images()[0].getpixel((0, 0))[0]) == ("single", 3, 90)
    folder = image_folder(tmp_path / "images")
    (folder / "00.txt").unlink()
    with pytest.raises(UserError, match="images have no prompt .*--best needs one"):
        score("--images", folder, *given[2:], "--output_dir", tmp_path / "o", "--best", 3)
    panel = tmp_path / "panel.yaml"
    panel.write_text("rewards: [{scorer: score-brightness, role: eval}]\n")
    with pytest.raises(UserError, match="--best: all scorers have the role eval"):
        score(*given[:2], "--config", panel, "--output_dir", tmp_path / "e", "--best", 3)
    assert not (tmp_path / "o").exists() and not (tmp_path / "e").exists()


def test_ranked_rows_are_groups(tmp_path):
    images = [
        [{"bytes": png(Image.new("RGB", (8, 8), (level,) * 3)), "path": None} for level in levels]
        for levels in ([10, 90, 50], [5, 7, 9])
    ]
    rows = [
        {"prompt": "grey", "images": images[0], "scores": [1.0, 3.0, 2.0]},
        {"prompt": "grey", "images": images[1], "scores": [3.0, 2.0, 1.0]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ranked.parquet")
    score(
        "--images",
        tmp_path / "ranked.parquet",
        "--scorers",
        "score-brightness",
        "--output_dir",
        tmp_path / "out",
        "--chunk_size",
        1,
    )
    found = table(tmp_path / "out")
    assert found["score-brightness"] == [10.0, 90.0, 50.0, 5.0, 7.0, 9.0]
    assert found["combined"] == [0.0, 1.0, 0.5, 0.0, 0.5, 1.0]
    assert summary(tmp_path / "out")["scorers"]["score-brightness"]["agrees_with_labels"] == 0.5


def test_combination_and_options_from_a_file_and_from_the_command_line(tmp_path):
    folder, out = image_folder(tmp_path / "images", 4), tmp_path / "out"
    config = tmp_path / "rewards.yaml"
    config.write_text(
        "rewards:\n  - {name: bright, scorer: score-brightness, "
        "normalize: {kind: affine, mean: 100, std: 10}}\n"
        "  - {scorer: shapes, role: eval}\ncombine: weighted_sum\n"
    )
    score("--images", folder, "--config", config, "--output_dir", out)
    found = table(out)
    assert found["combined"] == pytest.approx(
        [(value - 100) / 10 for value in found["bright"]], abs=1e-5
    )
    score(
        "--images",
        folder,
        "--config",
        config,
        "--output_dir",
        out,
        "--combine",
        "winrate",
        "--placement",
        "exclusive",
    )
    assert set(table(out)["combined"]) <= {0.0, 0.5, 1.0}
    score(
        "--images",
        folder,
        "--config",
        config,
        "--output_dir",
        out,
        "--scorer_args",
        "{bright: {weight: 2}, shapes: {graded: false}}",
    )
    assert table(out)["combined"] == pytest.approx(
        [(value - 100) / 5 for value in found["bright"]], abs=1e-5
    )
    assert set(table(out)["shapes"]) <= {0.0, 1.0}
    score(
        "--images",
        folder,
        "--scorers",
        "score-brightness",
        "--prompt",
        "x",
        "--output_dir",
        out,
        "--cache",
        tmp_path / "c.sqlite",
    )
    assert (tmp_path / "c.sqlite").is_file()


def test_work_is_done_once_and_only_what_changed_is_done_again(tmp_path):
    folder, out = image_folder(tmp_path / "images", 6), tmp_path / "out"
    run = ["--images", folder, "--output_dir", out, "--chunk_size", 2, "--scorers"]
    score(*run, "score-brightness")
    first = table(out)
    assert CALLS == [2, 2, 2]
    score(*run, "score-brightness,score-dark")
    assert CALLS == [2, 2, 2] and table(out)["score-brightness"] == first["score-brightness"]
    shutil.copy(folder / "00.png", folder / "03.png")
    score(*run, "score-brightness")
    assert CALLS == [2, 2, 2, 2]
    changed = table(out)["score-brightness"]
    assert changed[3] == first["score-brightness"][0]
    assert [v for i, v in enumerate(changed) if i != 3] == [
        v for i, v in enumerate(first["score-brightness"]) if i != 3
    ]

    @register_scorer("score-brightness", requires=("image",), override=True)
    def brightness(images):
        """Another definition under the same name."""
        return [-1.0 for _ in images]

    score(*run, "score-brightness")
    assert table(out)["score-brightness"] == [-1.0] * 6
    register_scorer("score-brightness", requires=("image",), override=True)(globals()["brightness"])


def test_unreadable_images_stop_or_are_missing_and_are_tried_again(tmp_path, capsys):
    folder, out = image_folder(tmp_path / "images", 5), tmp_path / "out"
    whole = (folder / "02.png").read_bytes()
    (folder / "02.png").write_bytes(whole[:60])
    run = [
        "--images",
        folder,
        "--scorers",
        "shapes,score-brightness",
        "--output_dir",
        out,
        "--chunk_size",
        2,
    ]
    with pytest.raises(UserError, match="02.png: .*cannot be decoded"):
        score(*run)
    score(*run, "--on_error", "nan")
    found = table(out)
    assert [value is None for value in found["shapes"]] == [False, False, True, False, False]
    assert found["combined"][2] is None and found["combined"][3] == 0.5
    assert [(e["scorer"], e["image"], e["row"]) for e in errors(out)] == [
        ("shapes", "02.png", 2),
        ("score-brightness", "02.png", 2),
    ]
    assert summary(out)["scorers"]["shapes"]["missing"] == 1
    assert "errors.jsonl" in capsys.readouterr().out
    (folder / "02.png").write_bytes(whole)
    score(*run)
    assert None not in table(out)["shapes"] and errors(out) == []


def test_broken_rows_of_a_dataset_are_listed(tmp_path):
    source = pair_table(tmp_path / "pairs.parquet", 4)
    rows = pq.read_table(source).to_pylist()
    rows[1]["rejected"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows), source)
    run = ["--images", source, "--scorers", "shapes", "--output_dir", tmp_path / "out"]
    with pytest.raises(UserError, match="1 of 4 rows are broken"):
        score(*run)
    score(*run, "--on_error", "nan")
    assert table(tmp_path / "out")["row"] == [0, 0, 2, 2, 3, 3]
    assert [error["row"] for error in errors(tmp_path / "out")] == [1]


def _environment(log: Path, **more: str) -> dict[str, str]:
    python_path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SCORE_LOG": str(log),
        "PYTHONPATH": python_path,
        **more,
    }


def _own(tmp_path: Path) -> tuple[list[str], Path]:
    """A folder of images and a run over it with a scorer of the user's own file,
    without its output folder."""
    (tmp_path / "own.py").write_text(OWN_SCORER)
    config = tmp_path / "rewards.yaml"
    config.write_text(
        f"- {{name: own, scorer: '{tmp_path}/own.py:logged'}}\n- {{scorer: shapes}}\n"
    )
    folder = image_folder(tmp_path / "images", 10)
    return [
        "--images",
        str(folder),
        "--config",
        str(config),
        "--chunk_size",
        "3",
        "--trust_remote_code",
        "--output_dir",
    ], folder


def _files(out: Path) -> list[bytes]:
    return [
        (out / name).read_bytes() for name in ("scores.parquet", "summary.json", "errors.jsonl")
    ]


@pytest.mark.nightly
def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    run, _ = _own(tmp_path)
    log, out = tmp_path / "log", tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, SCRIPT, *run, out],
        env=_environment(log, SCORE_DIES_AT="3"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -9, killed.stderr
    assert not (out / "scores.parquet").exists() and len(list((out / "parts").iterdir())) == 2
    monkeypatch.setenv("SCORE_LOG", str(log))
    score(*run, out)
    assert log.read_text().split() == [
        "3",
        "3",
        "3",
        "3",
        "1",
    ]  # the chunk that it died in, and the last
    monkeypatch.setenv("SCORE_LOG", str(tmp_path / "other_log"))
    score(*run, tmp_path / "uninterrupted")
    assert _files(out) == _files(tmp_path / "uninterrupted")


@pytest.mark.nightly
def test_two_processes_write_what_one_writes(tmp_path, monkeypatch):
    run, folder = _own(tmp_path)
    launch = [sys.executable, *TORCHRUN, SCRIPT, *run]
    log, both = tmp_path / "log", tmp_path / "both"
    found = subprocess.run(
        [*launch, both], env=_environment(log), capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("10 images") == 1 and sorted(log.read_text().split()) == [
        "1",
        "3",
        "3",
        "3",
    ]
    monkeypatch.setenv("SCORE_LOG", str(tmp_path / "other_log"))
    score(*run, tmp_path / "alone")
    assert _files(both) == _files(tmp_path / "alone")

    (folder / "04.png").write_bytes(b"no image")  # in the second process's share
    found = subprocess.run(
        [*launch, tmp_path / "broken"],
        env=_environment(log),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode != 0 and "diffalign: process 1: 04.png:" in found.stderr
    assert "Traceback" not in found.stderr.split("diffalign: process 1")[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scorers", "shape"],
         r"rewards\[0\].scorer: unknown scorer 'shape'; did you mean shapes"),
        ([], "--scorers, --config: give one of them"),
        (["--scorers", "shapes", "--config", "x.yaml"], "give one of them"),
        (["--config", "x.yaml"], "there is no file 'x.yaml'"),
        (["--scorers", "shapes", "--chunk_size", "0"], "--chunk_size: expected int >= 1, got 0"),
        (["--scorers", "shapes", "--combine", "average"],
         "combine.method: expected one of winrate"),
        (["--scorers", "shapes", "--combine", "weighted_sum",
          "--scorer_args", "{shapes: {normalize: z}}"], "--scorer_args.shapes.normalize"),
        (["--scorers", "shapes", "--scorer_args", "graded"], "--scorer_args: expected a mapping"),
        (["--scorers", "shapes", "--scorer_args", "{clip: {}}"],
         "--scorer_args.clip: no such scorer; there are shapes"),
        (["--scorers", "shapes", "--scorer_args", "{shapes: {grade: 1}}"],
         "args.grade: .*did you mean 'graded'"),
        (["--scorers", "shapes", "--placement", "gpu"], "placement: expected resident"),
        (["--scorers", "shapes", "--device", "abacus"], "device: expected auto"),
        (["--scorers", "shapes", "--prompt", "x", "--prompts", "y"],
         "--prompt and --prompts: give one"),
        (["--scorers", "shapes", "--prompts", "none.txt"],
         "--prompts: there is no file 'none.txt'"),
        (["--scorers", "shapes", "--columns", "prompt"], "--columns: expected a mapping"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(arguments, sentence, tmp_path):
    folder = image_folder(tmp_path / "images", 2)
    with pytest.raises(UserError, match=sentence) as error:
        score("--images", folder, "--output_dir", tmp_path / "out", *arguments)
    assert "\n" not in str(error.value)
    assert CALLS == []


def test_images_and_prompts_that_do_not_fit_are_refused(tmp_path):
    folder = image_folder(tmp_path / "images", 3)
    run = ["--scorers", "shapes", "--output_dir", tmp_path / "out"]
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "bad.jsonl").write_text("{}\n{\n")
    (tmp_path / "nameless.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "prompts.parquet").parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "prompts.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "named.yaml").write_text("- {name: prompt, scorer: shapes}\n")
    cases = [
        (
            ["--images", folder, "--prompts", tmp_path / "two.txt"],
            "has 2 lines, but there are 3 images",
        ),
        (["--images", folder, "--prompts", tmp_path / "bad.jsonl"], "line 2: not valid JSON"),
        (["--images", folder, "--prompts", tmp_path / "nameless.jsonl"], "names no image"),
        (["--images", tmp_path / "empty"], "holds no images"),
        (["--images", tmp_path / "nowhere"], "no such file or folder"),
        (["--images", tmp_path / "prompts.parquet"], "holds prompts and no images"),
        (["--images", tmp_path / "prompts.parquet", "--prompt", "x"], "is no folder of images"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            score(*arguments, *run)
    with pytest.raises(UserError, match="'prompt' is a column of the output"):
        score("--images", folder, "--config", tmp_path / "named.yaml")
    with pytest.raises(UserError, match="lies inside --images"):
        score("--images", folder, "--scorers", "shapes", "--output_dir", folder / "out")
    (folder / "01.txt").unlink()
    with pytest.raises(
        UserError, match=r"1 of 3 images have no prompt \(01.png\), and shapes needs one"
    ):
        score("--images", folder, *run)
    score("--images", folder, "--scorers", "score-brightness", "--output_dir", tmp_path / "out")
    assert table(tmp_path / "out")["prompt"][1] is None
