"""Numbers of the original ImageReward on the tiny checkpoint. Run in the old
environment, see README.md."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import common
import numpy as np
import torch

# sizes of bert-base with BLIP's two extra tokens, as in the published med_config.json
FULL_MED_CONFIG = {
    "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
    "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 768,
    "add_cross_attention": True,
}  # fmt: skip


def main() -> None:
    options = common.arguments(__doc__)
    from diffalign.rewards.testing import reference_models as checkpoints

    common.bare_package(
        "ImageReward", options.source / "ImageReward"
    )  # its __init__ wants diffusers
    common.stub("clip")  # only for its CLIP and aesthetic scorers
    import ImageReward.ImageReward as original
    from ImageReward.models.BLIP import blip, blip_pretrain
    from transformers import BertTokenizer

    sizes = checkpoints.imagereward_config()
    vision = sizes["vision"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoints.write_imagereward(folder)
        # the original asks the hub for the vocabulary by name, and hard-codes ViT-L;
        # both are replaced by the tiny ones
        load = BertTokenizer.from_pretrained
        blip.BertTokenizer = type(
            "Local",
            (),
            {"from_pretrained": staticmethod(lambda name: load(str(folder / "tokenizer")))},
        )
        full_vit = blip_pretrain.create_vit
        blip_pretrain.create_vit = lambda *a, **k: (
            blip.VisionTransformer(
                img_size=224, patch_size=vision["patch_size"], embed_dim=vision["hidden_size"],
                depth=vision["num_hidden_layers"],
                num_heads=vision["num_attention_heads"], drop_path_rate=0.1,
            ),
            vision["hidden_size"],
        )  # fmt: skip
        model = original.ImageReward(med_config=str(folder / "med_config.json"), device="cpu")
        model.mlp = original.MLP(sizes["text"]["hidden_size"])
        model.blip.vision_proj = torch.nn.Linear(vision["hidden_size"], checkpoints.PROJECTION)
        model.blip.text_proj = torch.nn.Linear(sizes["text"]["hidden_size"], checkpoints.PROJECTION)
        model.load_state_dict(
            torch.load(folder / "ImageReward.pt", map_location="cpu"), strict=True
        )
        model.eval()
        numbers, arrays = measure(model, checkpoints)

        blip_pretrain.create_vit = full_vit
        (folder / "full.json").write_text(json.dumps(FULL_MED_CONFIG))
        full = original.ImageReward(med_config=str(folder / "full.json"), device="cpu").state_dict()
    note = (
        "tiny random weights of diffalign/rewards/testing/reference_models.py; clip stubbed; "
        "BertTokenizer from the tiny vocabulary"
    )
    source = common.source_of(
        options.source,
        "THUDM/ImageReward",
        "torchvision",
        "transformers",
        "timm",
        "fairscale",
        note=note,
    )
    common.write(options.out, "imagereward", {"source": source, **numbers}, arrays)
    keys = {"source": source, "shapes": {name: list(value.shape) for name, value in full.items()}}
    packed = gzip.compress(json.dumps(keys).encode(), mtime=0)
    (options.out / "imagereward_full_keys.json.gz").write_bytes(packed)
    print(len(keys["shapes"]), "keys;", np.std(numbers["rewards_fp32"]), "std")


def measure(model, checkpoints):
    """Rewards of all images with all prompts, token ids, pixels, gradients."""
    images, prompts = checkpoints.sample_images(), checkpoints.PROMPTS
    tokens = model.blip.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    fp32 = [[model.score(prompt, image) for prompt in prompts] for image in images.values()]
    ranking, ranked = model.inference_rank(prompts[0], list(images.values()))
    crop = model.preprocess.transforms[:3]  # Resize, CenterCrop, RGB: 8-bit pixels before ToTensor
    pixels = []
    for image in images.values():
        for step in crop:
            image = step(image)
        pixels.append(np.asarray(image).transpose(2, 0, 1))
    inputs = torch.from_numpy(checkpoints.random_model_input(0))
    ids, mask = tokens.input_ids[:2], tokens.attention_mask[:2]
    leaf = inputs.clone().requires_grad_(True)
    rewards = model.score_gard(ids, mask, leaf)
    rewards.sum().backward()
    numbers = {
        "images": list(images), "prompts": prompts, "input_ids": tokens.input_ids.tolist(),
        "attended": tokens.attention_mask.sum(1).tolist(), "rewards_fp32": fp32,
        "rank": {"prompt": 0, "ranking": ranking, "rewards": ranked},
        "pixels_sha256": [common.sha256(p) for p in pixels],
    }  # fmt: skip
    gradient = leaf.grad.numpy()
    numbers["score_gard"] = {
        "pixels": "random_model_input(0) as the normalised input", "prompts": [0, 1],
        "rewards": rewards.flatten().tolist(),
        "gradient_norm": float(np.linalg.norm(gradient.astype(np.float64))),
    }  # fmt: skip
    arrays = {
        "pixels": np.stack([common.strided(p) for p in pixels]),
        "gradient": common.strided(gradient),
    }

    batch = torch.stack([model.preprocess(image) for image in images.values()]).double()
    model.double()
    rows = []
    with torch.no_grad():
        for picture in batch:
            many = picture[None].expand(len(prompts), -1, -1, -1)
            rows.append(
                model.score_gard(tokens.input_ids, tokens.attention_mask, many).flatten().tolist()
            )
    leaf = inputs.double().requires_grad_(True)
    rewards = model.score_gard(ids, mask, leaf)
    rewards.sum().backward()
    gradient = leaf.grad.numpy()
    numbers["rewards_fp64"] = rows
    numbers["score_gard"]["rewards_fp64"] = rewards.flatten().tolist()
    numbers["score_gard"]["gradient_norm_fp64"] = float(np.linalg.norm(gradient))
    arrays["gradient_fp64"] = common.strided(gradient)
    return numbers, arrays


if __name__ == "__main__":
    main()
