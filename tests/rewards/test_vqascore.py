"""VQAScore on a tiny Qwen2-VL: the probability of `generate`, options, bad input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import write_model

from diffalign import UserError, load_scorer
from diffalign.rewards import check_scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vlm")
    write_model(path)
    return path


def pictures(count: int = 3) -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(56, 56), (84, 56), (60, 110)]
    return [
        Image.fromarray(random.integers(0, 255, (*sizes[i % 3], 3), dtype=np.uint8))
        for i in range(count)
    ]


def generated(folder: Path, image: Image.Image, question: str) -> torch.Tensor:
    """Probabilities of the first token, as t2v_metrics reads them from `generate`."""
    import transformers as t

    processor = t.AutoProcessor.from_pretrained(folder)
    model: Any = t.AutoModelForImageTextToText.from_pretrained(folder).eval()
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    assert text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n")
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return output.scores[0][0].softmax(-1)


def test_it_is_the_probability_of_yes(folder: Path) -> None:
    scorer = load_scorer("vqascore", model=str(folder), answer="Y")
    images, prompts = pictures(), ["a cat", 'a sign "{OPEN}"', ""]
    scores = scorer(images, prompts)
    yes = scorer.processor.tokenizer("Y", add_special_tokens=False).input_ids
    assert len(yes) == 1
    for image, prompt, score in zip(images, prompts, scores.tolist(), strict=True):
        question = f'Does this figure show "{prompt}"? Please answer Yes or No.'
        expected = float(generated(folder, image, question)[yes[0]])
        assert score == pytest.approx(expected, rel=1e-4)
    assert len({round(score, 6) for score in scores.tolist()}) == 3
    check_scorer(scorer)


def test_against_an_opposite_answer(folder: Path) -> None:
    image, prompt = pictures(1), ["a cat"]

    def score(**options: Any) -> float:
        return load_scorer("vqascore", model=str(folder), **options)(image, prompt).item()

    yes, no = score(), score(answer="No")
    assert score(against="No") == pytest.approx(yes / (yes + no), rel=1e-4)
    assert (
        load_scorer("vqa_score", model=str(folder)).fingerprint()
        != load_scorer("vqascore", model=str(folder), against="No").fingerprint()
    )


def test_an_answer_of_several_tokens_is_their_geometric_mean(folder: Path) -> None:
    """The second token is asked for behind the first one."""
    scorer = load_scorer("vqascore", model=str(folder), answer="No")
    tokens = scorer.processor.tokenizer("No", add_special_tokens=False).input_ids
    assert len(tokens) == 2
    (image,) = pictures(1)
    question = 'Does this figure show "a cat"? Please answer Yes or No.'
    first = float(generated(folder, image, question)[tokens[0]])
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = scorer.processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = scorer.processor(images=[image], text=[text + "N"], return_tensors="pt")
    with torch.no_grad():
        logits = scorer.network(**inputs).logits[0, -1]
    second = float(logits.softmax(-1)[tokens[1]])
    assert scorer([image], ["a cat"]).item() == pytest.approx((first * second) ** 0.5, rel=1e-4)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "silent")
    for file in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / "silent" / file).unlink(missing_ok=True)
    with pytest.raises(UserError, match="it has no chat template, by which it could be asked"):
        load_scorer("vqascore", model=str(tmp_path / "silent"))
    with pytest.raises(UserError, match="model: expected the folder or the Hub id of a vision"):
        load_scorer("vqascore")
    with pytest.raises(UserError, match="template: expected a text with {prompt} in it"):
        load_scorer("vqascore", model=str(folder), template="Is it good?")
    with pytest.raises(UserError, match="model: .* cannot be loaded"):
        load_scorer("vqascore", model=str(tmp_path))
    with pytest.raises(UserError, match="answer: '' is no text for this model"):
        load_scorer("vqascore", model=str(folder), answer="")
