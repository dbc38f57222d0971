"""Numbers of the original MPS on the tiny checkpoint, in fp32 and fp64. Run in the old
environment, see README.md.

The original casts images and the mask to fp16; here `Tensor.half` does nothing, so that
the CPU can run it and the numbers are exact.
"""

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
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    from diffalign.rewards.testing import reference_models as checkpoints

    common.stub("fire", "cv2", "matplotlib", "matplotlib.pyplot")
    common.sys.path.insert(0, str(options.source))
    import eval_overall_mps_on_hpdv2 as evaluation
    import trainer.models.clip_model as original
    from trainer.models.cross_modeling import Cross_model

    torch.Tensor.half = lambda self: self
    sizes = checkpoints.mps_config()
    original.Cross_model = lambda **published: Cross_model(
        **sizes["cross"]
    )  # the original hard-codes 1024, 4 layers, 16 heads
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        CLIPModel(CLIPConfig.from_dict(sizes["clip"])).save_pretrained(folder / "clip")
        model = original.CLIPModel(str(folder / "clip"))
        tokenizer = AutoTokenizer.from_pretrained(
            str(checkpoints.write_clip_tokenizer(folder / "tokenizer", options.bpe))
        )
    model.load_state_dict(checkpoints.tensors(checkpoints.mps_state()), strict=True)
    model.eval()
    images, prompts = checkpoints.sample_images(), checkpoints.PROMPTS
    processor = CLIPImageProcessor(**checkpoints.preprocessor_config())
    pixels = processor(list(images.values()), return_tensors="pt").pixel_values
    condition = evaluation.infer_one_sample.__wrapped__.__code__.co_consts
    condition = next(c for c in condition if isinstance(c, str) and c.startswith("light, color"))
    ids = tokenizer(
        [*prompts, condition],
        max_length=77,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    ).input_ids

    def benchmark():  # threshold 0.3, one image at a time, by the evaluation script
        call = evaluation.infer_one_sample
        return [
            [float(call(i, p, model, processor, tokenizer, "cpu")[0]) for p in prompts]
            for i in images.values()
        ]

    def published(
        batch,
    ):  # threshold 0.01, by the module's own forward, which takes two images a prompt
        return [
            [forward(model, row, ids[-1:], torch.stack([picture, picture])) for row in ids[:-1]]
            for picture in batch
        ]

    numbers = {
        "source": common.source_of(
            options.source, "Kwai-Kolors/MPS", "transformers", "einops",
            note=
                "tiny random weights of diffalign/rewards/testing/reference_models.py; batches of "
                "one prompt; Tensor.half made the identity",
        ),
        "images": list(images), "prompts": prompts, "condition": condition,
        "condition_ids": ids[-1].tolist(),
        "input_ids": [row.tolist() for row in ids[:-1]],
        "scores_threshold_0.3": benchmark(), "scores_threshold_0.01": published(pixels),
    }  # fmt: skip
    model.double()
    processor_fp32 = processor
    processor = lambda image, **options: {  # noqa: E731
        "pixel_values": processor_fp32(image, **options)["pixel_values"].double()
    }
    numbers["scores_threshold_0.3_fp64"] = benchmark()
    numbers["scores_threshold_0.01_fp64"] = published(pixels.double())
    numbers["kept_tokens"], sims = kept(model, ids)
    arrays = {"similarity": sims, "model_input": common.strided(pixels.numpy())}
    inputs = torch.from_numpy(checkpoints.random_model_input(3)).double().requires_grad_(True)
    score = pair(model, ids[:1], ids[-1:], inputs)
    score.sum().backward()
    numbers["gradient_fp64"] = {
        "pixels": (
            "random_model_input(3) as the normalised input, two images of prompt 0, of the sum of "
            "the scores, threshold 0.01"
        ),
        "scores": score.tolist(), "norm": float(inputs.grad.norm()),
    }  # fmt: skip
    arrays["gradient_fp64"] = common.strided(inputs.grad.numpy())
    common.write(options.out, "mps", numbers, arrays)
    for name in ("0.3", "0.01"):
        wide = np.array(numbers[f"scores_threshold_{name}_fp64"])
        print(
            name,
            wide.std(0).mean(),
            wide.std(1).mean(),
            np.abs(wide - numbers[f"scores_threshold_{name}"]).max(),
        )
    print(
        numbers["kept_tokens"],
        {
            name: tuple(v.shape)
            for name, v in model.state_dict().items()
            if name.startswith("cross")
        },
    )


def pair(model, text, condition, images):
    """Scores of two images of one prompt as the README computes them from the module's
    outputs."""
    text_f, first, second = model(text, images, condition)
    unit = [f / f.norm(dim=-1, keepdim=True) for f in (text_f, first, second)]
    return torch.cat([model.logit_scale.exp() * torch.diag(unit[0] @ f.T) for f in unit[1:]])


def forward(model, row, condition, images):
    """Score of an image given twice."""
    with torch.no_grad():
        return float(pair(model, row[None], condition, images)[0])


def kept(model, ids):
    """Per prompt how many of the 77 tokens pass 0.3 and 0.01, and the similarities
    themselves, by the module's text tower."""
    with torch.no_grad():
        features, _ = model.get_text_features(ids)
        sims = (features[:-1] @ features[-1].T).amax(-1)  # (prompts, 77)
        sims = sims / sims.amax(-1, keepdim=True)
    return {str(t): (sims > t).sum(1).tolist() for t in (0.3, 0.01)}, sims.numpy()


if __name__ == "__main__":
    main()
