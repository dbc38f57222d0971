"""Numbers of the original HPSv2 on the tiny checkpoint.

Run twice: in the old environment, whose torchvision resizes tensors without
antialiasing, as when HPSv2 was published (`--name hpsv2_legacy`), and in a current one,
where the same code antialiases (`--name hpsv2_antialias`). See README.md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import common
import numpy as np
import torch


def main() -> None:
    options = common.arguments(__doc__, name="of the fixture")
    from diffalign.rewards.testing import reference_models as checkpoints

    common.stub("clint", "clint.textui", "turtle")
    common.sys.path.insert(0, str(options.source))
    import hpsv2.img_score as original
    from hpsv2.src.open_clip import factory, tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "ViT-tiny.json").write_text(json.dumps(checkpoints.hpsv2_config()))
        factory.add_model_config(folder / "ViT-tiny.json")
        # img_score's own call, with the tiny architecture and without the LAION weights
        # that it replaces anyway
        model, _, preprocess = original.create_model_and_transforms(
            "ViT-tiny",
            None,
            precision="amp",
            device="cpu",
            light_augmentation=True,
            aug_cfg={},
            output_dict=True,
        )
        original.model_dict.update(model=model, preprocess_val=preprocess)
        original.device = "cpu"
        torch.save(
            {"state_dict": checkpoints.tensors(checkpoints.hpsv2_state())}, folder / "tiny.pt"
        )
        images, prompts, errors, scores = checkpoints.sample_images(), checkpoints.PROMPTS, {}, []
        for name, image in images.items():
            try:
                scores.append(
                    [
                        float(original.score(image, prompt, cp=str(folder / "tiny.pt"))[0])
                        for prompt in prompts
                    ]
                )
            except RuntimeError as error:  # RGBA reaches the network with four channels
                scores.append(None)
                errors[name] = f"{type(error).__name__}: {error}"[:200]
    note = (
        "tiny random weights of diffalign/rewards/testing/reference_models.py; clint and turtle "
        "stubbed; CPU, so its autocast does nothing"
    )
    ids = tokenizer.tokenize(prompts)
    numbers = {
        "source": common.source_of(options.source, "tgxs002/HPSv2", "torchvision", "ftfy", "regex",
         note=note),
        "images": list(images), "prompts": prompts,
        "input_ids": [row[: row.nonzero().max() + 1].tolist() for row in ids],
        "scores": scores, "errors": errors,
    }  # fmt: skip
    pixels = {name: preprocess(image) for name, image in images.items() if name not in errors}
    arrays = {"model_input": common.strided(torch.stack(list(pixels.values())).numpy())}
    numbers["model_input_images"] = list(pixels)
    inputs = torch.from_numpy(checkpoints.random_model_input(2)).requires_grad_(True)
    out = model(inputs, ids[:2])
    pairs = (out["image_features"] * out["text_features"]).sum(-1)
    pairs.sum().backward()
    numbers["gradient"] = {
        "pixels": (
            "random_model_input(2) as the normalised input, of the sum of the scores of the two "
            "pairs"
        ), "prompts": [0, 1],
        "scores": pairs.tolist(), "norm": float(inputs.grad.norm()),
    }  # fmt: skip
    arrays["gradient"] = common.strided(inputs.grad.numpy())
    model.double()
    with torch.no_grad():
        out = model(torch.stack(list(pixels.values())).double(), ids)
    wide = iter((out["image_features"] @ out["text_features"].T).tolist())
    numbers["scores_fp64"] = [None if name in errors else next(wide) for name in images]
    common.write(options.out, str(options.name), numbers, arrays)
    known = np.array([row for row in scores if row])
    print(errors, known.std(0).mean(), known.std(1).mean())


if __name__ == "__main__":
    main()
