"""HPSv3 against the authors' code on tiny random weights, and what would go
unnoticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import hpsv3_tiny as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import write_hpsv3

from diffalign import UserError, load_scorer
from diffalign.rewards import check_scorer
from diffalign.rewards.scorers.hpsv3 import INSTRUCTION, RATING, image_size

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "hpsv3.json").read_text())["moments"]
HEAD = {"config": dict(tiny.HEAD)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hpsv3(tmp_path_factory.mktemp("hpsv3"))


def moments(scorer: object) -> torch.Tensor:
    rows = []
    for image, prompt in tiny.samples():
        size = image_size(*image.size)
        rows.append(scorer.moments(image.resize(size, 3), prompt))  # type: ignore[attr-defined]
    return torch.stack(rows).double()


def test_the_question_is_the_published_one() -> None:
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (INSTRUCTION, RATING)]
    assert digests == ["0393599dad45a971", "2471faca094ae5bd"]


def test_moments_are_the_authors_in_float32(folder: Path) -> None:
    """Their code in float32 rounds no positions."""
    scorer = load_scorer("hpsv3", model=str(folder), rounded_positions=False, **HEAD)
    expected = torch.tensor(FIXTURE["float32"], dtype=torch.float64)
    torch.testing.assert_close(moments(scorer), expected, rtol=1e-4, atol=1e-4)


def test_moments_are_the_authors_in_bfloat16_and_rounding_is_part_of_it(folder: Path) -> None:
    expected = torch.tensor(FIXTURE["bfloat16"], dtype=torch.float64)
    errors = {}
    for rounded in (True, False):
        scorer = load_scorer(
            "hpsv3", model=str(folder), dtype="bfloat16", rounded_positions=rounded, **HEAD
        )
        errors[rounded] = (moments(scorer) - expected).abs().mean().item()
    print(errors)
    assert errors[True] < 0.15 < errors[False]


def test_scores_are_the_means(folder: Path) -> None:
    scorer = load_scorer("hpsv3", model=str(folder), **HEAD)
    images, prompts = zip(*tiny.samples(), strict=True)
    scores = scorer(list(images), list(prompts))
    torch.testing.assert_close(scores.double(), moments(scorer)[:, 0], rtol=1e-4, atol=1e-4)
    check_scorer(scorer)
    rounded = load_scorer("hps_v3", model=str(folder), rounded_positions=False, **HEAD)
    assert scorer.fingerprint() != rounded.fingerprint()


def test_another_export_of_the_weights_is_read_too(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "HPSv3.safetensors")
    later = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = f"model.language_model.{name.removeprefix('model.')}"
        later[name] = tensor
    save_file(later, tmp_path / "HPSv3.safetensors")
    image, prompt = tiny.samples()[0]
    scores = [
        load_scorer("hpsv3", model=str(place), tokenizer=str(folder), **HEAD)([image], [prompt])
        for place in (folder, tmp_path)
    ]
    assert torch.equal(*scores)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (1024, 1024, (448, 448)),
        (448, 448, (448, 448)),
        (1024, 768, (504, 364)),
        (1920, 1080, (588, 336)),
        (400, 300, (532, 392)),
        (1000, 100, (1428, 168)),
    ],
)
def test_image_sizes(width: int, height: int, size: tuple[int, int]) -> None:
    assert image_size(width, height) == size


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    scorer = load_scorer("hpsv3", model=str(folder), **HEAD)
    image, _ = tiny.samples()[0]
    with pytest.raises(
        UserError, match=r"a prompt holds <\|Reward\|>, a special token of the model"
    ):
        scorer([image], ["a <|Reward|> cat"])
    with pytest.raises(UserError, match="model: .* does not fit Qwen/Qwen2-VL-7B-Instruct"):
        load_scorer("hpsv3", model=str(folder))  # the head of 7B
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match="is no checkpoint of HPSv3: it has no embeddings"):
        load_scorer("hpsv3", model=str(tmp_path), tokenizer=str(folder))
    with pytest.raises(UserError, match="tokenizer: .* holds no Qwen2-VL configuration"):
        load_scorer("hpsv3", model=str(folder), tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="at most 200 times as long as wide"):
        image_size(10_000, 20)
