"""Weights that are missing, foreign, damaged or dangerous are refused in one sentence;
what is loaded is whole."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from models import MODELS, load_tiny
from PIL import Image
from tiers import by_default

from diffalign import UserError, load_scorer
from diffalign.rewards import checkpoints as loading
from diffalign.rewards.testing import reference_models as checkpoints

PUBLISHED = [name for name in MODELS if name != "shapes-clip"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_left_on_the_meta_device_and_nothing_trains(name, tmp_path):
    scorer = load_tiny(name, tmp_path)
    modules = list(scorer.modules())
    assert modules
    for module in modules:
        assert not module.training
        for tensor in (*module.parameters(), *module.buffers()):
            assert not tensor.is_meta and not tensor.requires_grad


@by_default(values=2)
@pytest.mark.parametrize("name", ["imagereward", "pickscore", "hpsv2.1", "mps", "aesthetic-v2"])
def test_missing_extra_and_misshapen_keys_are_named(name, tmp_path):
    arguments = MODELS[name](tmp_path)
    path = arguments["model"]
    if path.is_dir():
        path = path / "model.safetensors"
    state = {
        key: value.clone() for key, value in loading.read_state(path).items()
    }  # the file is overwritten below
    some = next(
        key
        for key in state
        if key.endswith("weight") and "proj" not in key and state[key].ndim == 2
    )

    def load(changed):
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({key: value.contiguous() for key, value in changed.items()}, path)
        else:
            torch.save(changed, path)
        return load_scorer(name, **arguments)

    short = some.split(".")[-2] + "." + some.split(".")[-1]
    with pytest.raises(UserError, match=r"does not fit .*lacks 1 \(.*" + short.replace(".", r"\.")):
        load({key: value for key, value in state.items() if key != some})
    with pytest.raises(UserError, match=r"has unknown 1 \(.*surplus\.weight"):
        load(
            {**state, "model.surplus.weight" if name == "mps" else "surplus.weight": torch.ones(2)}
        )
    with pytest.raises(UserError, match=r"has misshapen \d+ \(.*instead of"):
        load({**state, some: torch.ones(3, 7)})
    assert load(state) is not None


class Dangerous:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["imagereward", "hpsv2.1", "aesthetic-v2", "mps"])
def test_a_pickle_with_code_is_refused_and_not_run(name, tmp_path):
    arguments = MODELS[name](tmp_path)
    bad = tmp_path / "bad.pt"
    torch.save({"state_dict": Dangerous(tmp_path / "ran")}, bad)
    with pytest.raises(UserError, match="would run code when loaded, so it is refused") as caught:
        load_scorer(name, **{**arguments, "model": bad})
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)


def test_a_folder_whose_only_weights_are_a_pickle_with_code(tmp_path):
    folder = checkpoints.write_pickscore(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(Dangerous(tmp_path / "ran"), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="refused"):
        load_scorer("pickscore", model=folder)
    assert not (tmp_path / "ran").exists()
    torch.save(checkpoints.tensors(checkpoints.pickscore_state()), folder / "pytorch_model.bin")
    assert load_scorer("pickscore", model=folder).clip.max_length == 77


def test_damaged_files_and_wrong_places(tmp_path):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"\x80\x02not a checkpoint")
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    folder = tmp_path / "nothing"
    folder.mkdir()
    for model, message in (
        (damaged, "is no checkpoint|refused"),
        (empty, "is no safetensors file"),
        (folder, "holds no weights file; pass the file of imagereward itself"),
        (tmp_path / "nowhere.pt", "there is no file or folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_scorer(
                "imagereward", **{**MODELS["imagereward"](tmp_path / "whole"), "model": model}
            )
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no config.json"):
        load_scorer("pickscore", model=folder)
    with pytest.raises(UserError, match="is a file; pickscore reads a folder"):
        load_scorer("pickscore", model=damaged)


def test_published_weights_that_are_not_here_say_where_they_are(tmp_path):
    with pytest.raises(
        UserError,
        match=r"pickscore, 'yuvalkirstain/PickScore_v1', are not on this machine.*pass model=",
    ):
        load_scorer("pickscore")
    with pytest.raises(UserError, match=r"HPS_v2.1_compressed.pt of 'xswu/HPSv2'"):
        load_scorer("hpsv2.1")
    with pytest.raises(
        UserError,
        match=r"'laion2b_s32b_b79k' of ViT-H-14 are not on this machine and cannot be downloaded",
    ):
        load_scorer("clip-h14")
    with pytest.raises(UserError, match=r"is published at https://github.com/.*pass model=FILE"):
        load_scorer("aesthetic-v2")
    with pytest.raises(UserError, match="pickled module"):
        load_scorer("mps")
    with pytest.raises(UserError, match="write open_clip:ViT-B-32/TAG or pass model=FILE"):
        load_scorer("open_clip:ViT-B-32")
    with pytest.raises(UserError, match="has no architecture 'ViT-B-33'; did you mean ViT-B-32"):
        load_scorer("open_clip:ViT-B-33/openai")
    with pytest.raises(UserError, match="has no weights 'mine' of ViT-B-32"):
        load_scorer("open_clip:ViT-B-32/mine")


def test_a_tokenizer_that_does_not_belong_is_refused(tmp_path):
    arguments = MODELS["imagereward"](tmp_path)
    vocabulary = tmp_path / "tokenizer" / "vocab.txt"
    as_file = load_scorer("imagereward", **{**arguments, "tokenizer": vocabulary})
    as_folder = load_scorer("imagereward", **arguments)
    assert (
        len(as_file.tokenizer) == len(as_folder.tokenizer) == len(checkpoints.bert_vocabulary()) + 2
    )  # [DEC], [ENC]
    with pytest.raises(UserError, match="tokenizer: .* cannot be loaded"):
        load_scorer("imagereward", **{**arguments, "tokenizer": tmp_path / "nowhere"})
    long = tmp_path / "long.txt"
    long.write_text(vocabulary.read_text() + "\n".join(f"more{i}" for i in range(50)))
    with pytest.raises(UserError, match="its ids go up to .*pass the tokenizer of this checkpoint"):
        load_scorer("imagereward", **{**arguments, "tokenizer": long})
    short = tmp_path / "short.txt"
    short.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(UserError, match="holds a vocabulary of 5 entries"):
        load_scorer("imagereward", **{**arguments, "tokenizer": short})


def test_configurations_are_checked(tmp_path):
    arguments = MODELS["imagereward"](tmp_path)
    for config, message in (
        ({"visoin": {}}, "config: unknown section 'visoin'; imagereward takes vision and text"),
        (
            {"vision": {"hiden_size": 3}},
            "config.vision.hiden_size: BlipVisionConfig has no such field",
        ),
        ({"text": {"encoder_hidden_size": 99}}, "config.text.encoder_hidden_size: is 99"),
        (tmp_path / "none.json", "expected a mapping or a JSON file"),
    ):
        with pytest.raises(UserError, match=message):
            load_scorer("imagereward", **{**arguments, "config": config})
    with pytest.raises(UserError, match="open_clip cannot build a network"):
        load_scorer("hpsv2.1", model=checkpoints.write_hpsv2(tmp_path / "h"), config={"embed": 3})
    folder = checkpoints.write_pickscore(tmp_path / "p")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "crop_size": 200}))
    with pytest.raises(UserError, match="crops to 200 pixels, but the network reads 224"):
        load_scorer("pickscore", model=folder)


@pytest.mark.nightly
def test_the_fingerprint_follows_the_content_and_the_settings(tmp_path):
    first = load_tiny("pickscore", tmp_path)
    shutil.copytree(tmp_path / "pickscore", tmp_path / "copy")
    assert load_scorer("pickscore", model=tmp_path / "copy").fingerprint() == first.fingerprint()
    checkpoints.write_pickscore(tmp_path / "other", seed=7)
    assert load_scorer("pickscore", model=tmp_path / "other").fingerprint() != first.fingerprint()
    options = ({}, {"antialias": False}, {"scale": 100.0}, {"dtype": "bfloat16"})
    seen = {
        load_tiny("hpsv2.1", tmp_path / str(i), **given).fingerprint()
        for i, given in enumerate(options)
    }
    assert len(seen) == 4
    assert load_tiny("hpsv2.0", tmp_path).fingerprint() not in seen
    with pytest.raises(UserError, match="contradicts"):
        load_tiny("hpsv2.1", tmp_path / "c", antialias=True, preprocess="legacy")


def test_long_prompts_are_truncated_with_a_warning(tmp_path):
    for name in ("imagereward", "pickscore", "hpsv2.1", "mps"):
        scorer = load_tiny(name, tmp_path)
        image = Image.new("RGB", (40, 40), (200, 30, 30))
        with pytest.warns(
            UserWarning, match=r"a prompt of 10000 characters .* is longer than (35|77) tokens"
        ):
            value = scorer([image], ["red cat " * 1250])
        assert value.isfinite().all()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert scorer([image], ["a red cat"]).isfinite().all()


def test_folders_as_they_come(tmp_path):
    """Vocabulary files without settings; CLIP and its aesthetic head in one folder."""
    arguments = MODELS["imagereward"](tmp_path / "a")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "a" / "tokenizer" / "vocab.txt", bare)
    image, prompt = [Image.new("RGB", (50, 40), (200, 30, 30))], ["a photo of a red cat"]
    expected = load_scorer("imagereward", **arguments)(image, prompt)
    assert load_scorer("imagereward", **{**arguments, "tokenizer": bare})(image, prompt) == expected
    shutil.copy(bare / "vocab.txt", tmp_path / "a")
    assert (
        load_scorer("imagereward", model=tmp_path / "a", config=arguments["config"])(image, prompt)
        == expected
    )

    folder = checkpoints.write_pickscore(tmp_path / "p")
    expected = load_scorer("pickscore", model=folder)(image, prompt)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"):
        (folder / name).unlink()
    assert load_scorer("pickscore", model=folder)(image, prompt) == expected

    both = checkpoints.write_clip(tmp_path / "clip")
    head = checkpoints.write_aesthetic(both, 2, 16)
    expected = load_scorer("aesthetic-v2", model=head, config={"clip": both})(image)
    assert (
        load_scorer("aesthetic-v2", model=head)(image)
        == load_scorer("aesthetic-v2", model=both)(image)
        == expected
    )


@pytest.mark.nightly
def test_half_precision_towers_stay_close_and_heads_stay_wide(tmp_path):
    images = [image for image in checkpoints.sample_images().values() if image.mode == "RGB"]
    prompts = checkpoints.PROMPTS[:2] * len(images)
    for name in ("imagereward", "pickscore", "aesthetic-v2"):
        exact = load_tiny(name, tmp_path)(images, prompts[: len(images)])
        scorer = load_tiny(name, tmp_path / "half", dtype="bfloat16")
        assert all(p.dtype == torch.float32 for head in scorer.heads() for p in head.parameters())
        half = scorer(images, prompts[: len(images)])
        assert (
            half.isfinite().all()
            and float((half - exact).abs().max()) < 0.25 * float(exact.std()) + 1.5
        )
        with pytest.raises(
            UserError, match="dtype: .* was rounded to bfloat16 and cannot be widened"
        ):
            scorer.to(dtype="float32")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", "x"),
        ("size", {"shortest_edge": -4}),
        ("image_std", []),
        ("image_std", [0, 1, 1]),
        ("image_mean", ["a"] * 3),
        ("image_mean", 5),
        ("crop_size", None),
        ("size", {"shortest_edge": 10**9}),
    ],
)
def test_senseless_preprocessing_is_refused(name, value, tmp_path):
    folder = MODELS["pickscore"](tmp_path)["model"]
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(UserError, match="pixels|numbers|cannot be built"):
        load_scorer("pickscore", model=folder)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text_config", "hidden_size", "wide"),
        ("text_config", "num_attention_heads", 0),
        ("vision_config", "patch_size", 0),
        ("vision_config", "num_hidden_layers", -1),
        ("vision_config", "hidden_act", "none"),
        ("text_config", "vocab_size", 1e30),
    ],
)
def test_a_config_without_sense_is_one_sentence(
    section, field, value, tmp_path, capsys, monkeypatch
):
    from diffalign import cli

    monkeypatch.chdir(tmp_path)
    folder = MODELS["pickscore"](tmp_path)["model"]
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values[section][field] = value
    file.write_text(json.dumps(values))
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (16, 16)).save(images / "a.png")
    (images / "a.txt").write_text("a red circle")
    given = json.dumps({"pickscore": {"model": str(folder)}})
    assert (
        cli.run(
            ["score", "--images", str(images), "--scorers", "pickscore", "--scorer_args", given]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert "pickscore" in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "diffalign-scores").exists()


def senseless(values, generator):
    """A JSON object with one or two of its fields, at any depth, set to something odd
    or left out."""
    changed = json.loads(json.dumps(values, default=str))
    odd = [0, -1, 1, 7, 10**9, 1e30, "x", None, [], {}, True, 0.5, "gelu"]
    for _ in range(generator.randint(1, 2)):
        place, name = changed, None
        while isinstance(place, dict) and place and (name is None or generator.random() < 0.7):
            parent, name = place, generator.choice(sorted(place))
            place = parent[name]
        if name is not None and generator.random() < 0.2:
            del parent[name]
        elif name is not None:
            parent[name] = generator.choice(odd)
    return changed


@pytest.mark.nightly
@pytest.mark.parametrize("name", PUBLISHED)
def test_mutated_configurations_are_read_or_refused(name, tmp_path):
    """60 per scorer, 600 in all: every one scores an image, or is one sentence."""
    generator = random.Random(name)
    whole = tmp_path / "whole"
    whole.mkdir()
    arguments = MODELS[name](whole)
    refused = 0
    for number in range(60):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        moved = {
            key: folder / value.relative_to(whole) if isinstance(value, Path) else value
            for key, value in arguments.items()
        }
        files = [path for path in sorted(folder.rglob("*.json")) if path.stat().st_size < 50_000]
        mappings = [key for key, value in moved.items() if isinstance(value, dict)]
        chosen = generator.choice([*files, *mappings])
        if isinstance(chosen, str):
            moved[chosen] = senseless(moved[chosen], generator)
        else:
            chosen.write_text(json.dumps(senseless(json.loads(chosen.read_text()), generator)))
        try:
            load_scorer(name, **moved).score([Image.new("RGB", (40, 50), "red")], ["a red circle"])
        except UserError:
            refused += 1
        shutil.rmtree(folder)
    assert 5 < refused < 60
