"""Numbers of PickScore's README code on the tiny checkpoint. Run in the old
environment, see README.md."""

from __future__ import annotations

import tempfile
from pathlib import Path

import common
import numpy as np
import torch


def main() -> None:
    options = common.arguments(
        __doc__, bpe="bpe_simple_vocab_16e6.txt.gz, e.g. of the HPSv2 checkout"
    )
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from diffalign.rewards.testing import reference_models as checkpoints

    model = CLIPModel(CLIPConfig.from_dict(checkpoints.clip_config()))
    model.load_state_dict(checkpoints.tensors(checkpoints.pickscore_state()), strict=True)
    model.eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoints.write_clip_tokenizer(Path(temporary), options.bpe)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    processor = CLIPProcessor(CLIPImageProcessor(**checkpoints.preprocessor_config()), tokenizer)
    space = {"torch": torch, "processor": processor, "model": model, "device": "cpu"}
    calc_probs = common.definitions(options.source / "README.md", {"calc_probs"}, space)[
        "calc_probs"
    ]

    images, prompts = checkpoints.sample_images(), checkpoints.PROMPTS
    tokens = processor(
        text=prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    pixels = processor(
        images=list(images.values()),
        padding=True,
        truncation=True,
        max_length=77,
        return_tensors="pt",
    ).pixel_values
    raw = CLIPImageProcessor(
        **{**checkpoints.preprocessor_config(), "do_normalize": False, "do_rescale": False}
    )
    raw = np.stack(raw(list(images.values()), return_tensors="np")["pixel_values"]).astype(np.uint8)
    with torch.no_grad():
        image_emb, text_emb = embed(model, pixels, tokens)
        scores = model.logit_scale.exp() * (
            text_emb @ image_emb.T
        )  # the README's line, for all prompts at once
    numbers = {
        "source": common.source_of(
            options.source, "yuvalkirstain/PickScore", "transformers", "tokenizers",
            note=
                "code of README.md on tiny random weights of "
                "diffalign/rewards/testing/reference_models.py; CLIPTokenizerFast, "
                "CLIPImageProcessor",
        ),
        "images": list(images), "prompts": prompts, "tokenizer": type(tokenizer).__name__,
        "input_ids": trimmed(tokens), "scores": scores.T.tolist(),
        "logit_scale": float(model.logit_scale),
        "readme_probabilities": [calc_probs(prompt, list(images.values())) for prompt in prompts],
        "pixels_sha256": [common.sha256(p) for p in raw],
    }  # fmt: skip
    arrays = {"pixels": common.strided(raw), "model_input": common.strided(pixels.numpy())}
    arrays["image_embeddings"], arrays["text_embeddings"] = image_emb.numpy(), text_emb.numpy()
    inputs = torch.from_numpy(checkpoints.random_model_input(1)).requires_grad_(True)
    image_emb, text_emb = embed(model, inputs, {name: value[:2] for name, value in tokens.items()})
    pairs = model.logit_scale.exp() * (text_emb * image_emb).sum(-1)
    pairs.sum().backward()
    numbers["gradient"] = {
        "pixels": (
            "random_model_input(1) as the normalised input, of the sum of the scores of the two "
            "pairs"
        ), "prompts": [0, 1],
        "scores": pairs.tolist(), "norm": float(inputs.grad.norm()),
    }  # fmt: skip
    arrays["gradient"] = common.strided(inputs.grad.numpy())
    model.double()
    with torch.no_grad():
        image_emb, text_emb = embed(model, pixels.double(), tokens)
        numbers["scores_fp64"] = (model.logit_scale.exp() * (text_emb @ image_emb.T)).T.tolist()
    common.write(options.out, "pickscore", numbers, arrays)
    print(np.array(numbers["scores"]).std(0).mean(), np.array(numbers["scores"]).std(1).mean())


def embed(model, pixels, tokens):
    """Unit features of images and texts."""
    features = model.get_image_features(pixel_values=pixels), model.get_text_features(**tokens)
    return [f / torch.norm(f, dim=-1, keepdim=True) for f in features]


def trimmed(tokens):
    """Token ids without padding."""
    lengths = tokens.attention_mask.sum(1).tolist()
    return [row[:length].tolist() for row, length in zip(tokens.input_ids, lengths)]  # noqa: B905


if __name__ == "__main__":
    main()
