"""Numbers of the original LAION aesthetic heads on random heads and random features.
Run in the old environment, see README.md.

`--source` is the checkout of improved-aesthetic-predictor (v2), `--first` that of
aesthetic-predictor (v1). Both repositories also hold the published weights; their
hashes and outputs on the same features are stored for a check by whoever has the files.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import types
from pathlib import Path

import common
import torch


def main() -> None:
    options = common.arguments(__doc__, first="checkout of LAION-AI/aesthetic-predictor")
    from diffalign.rewards.testing import reference_models as checkpoints

    nn = torch.nn
    space = {"nn": nn, "pl": types.SimpleNamespace(LightningModule=nn.Module)}
    v2 = common.definitions(options.source / "simple_inference.py", {"MLP", "normalized"}, space)
    space = {"nn": nn, "os": os, "torch": torch, "urlretrieve": None}
    notebook = common.definitions(
        options.first / "asthetics_predictor.ipynb", {"get_aesthetic_model"}, space
    )
    features = checkpoints.random_features()
    unit = torch.from_numpy(v2["normalized"](features))

    def run_v2(file):
        model = v2["MLP"](features.shape[1])
        model.load_state_dict(torch.load(file, map_location="cpu"), strict=True)
        with torch.no_grad():
            return model.eval()(unit).flatten().tolist(), model.double()(
                unit.double()
            ).flatten().tolist()

    def run_v1(file):
        with (
            tempfile.TemporaryDirectory() as home
        ):  # the notebook reads ~/.cache/emb_reader/sa_0_4_vit_l_14_linear.pth
            cache = Path(home) / ".cache" / "emb_reader"
            cache.mkdir(parents=True)
            (cache / "sa_0_4_vit_l_14_linear.pth").write_bytes(Path(file).read_bytes())
            notebook["expanduser"] = lambda name: home
            model = notebook["get_aesthetic_model"]("vit_l_14")
        raw = torch.from_numpy(features)
        raw = raw / raw.norm(dim=-1, keepdim=True)  # the notebook's third cell
        with torch.no_grad():
            return model(raw).flatten().tolist(), model.double()(raw.double()).flatten().tolist()

    with tempfile.TemporaryDirectory() as temporary:
        own = {v: checkpoints.write_aesthetic(Path(temporary), v) for v in (1, 2)}
        tiny = {"v1": run_v1(own[1]), "v2": run_v2(own[2])}
    published = {
        "v1": options.first / "sa_0_4_vit_l_14_linear.pth",
        "v2": options.source / "sac+logos+ava1-l14-linearMSE.pth",
    }
    results = {"v1": run_v1(published["v1"]), "v2": run_v2(published["v2"])}
    sources = {
        "v1": common.source_of(options.first, "LAION-AI/aesthetic-predictor",
         note="function of asthetics_predictor.ipynb"),
        "v2": common.source_of(
            options.source, "christophschuhmann/improved-aesthetic-predictor",
            note=
                "class MLP and function normalized of simple_inference.py, LightningModule "
                "replaced by nn.Module",
        ),
    }  # fmt: skip
    numbers = {
        "source": sources,
        "features": "random_features()",
        "normalised_norms": unit.norm(dim=-1).tolist(),
    }
    for version in ("v1", "v2"):
        numbers[version] = {
            "outputs": tiny[version][0], "outputs_fp64": tiny[version][1],
            "published_sha256": hashlib.sha256(published[version].read_bytes()).hexdigest(),
            "published_outputs": results[version][0], "published_outputs_fp64": results[version][1],
        }  # fmt: skip
    common.write(options.out, "aesthetic", numbers)
    print({v: numbers[v]["outputs"] for v in ("v1", "v2")}, results)


if __name__ == "__main__":
    main()
