"""`diffalign data recaption`: strategies, captioners, perturbers, resumes, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import pair_rows

from diffalign import cli, load_preferences
from diffalign.annotation.captioners import ShapesCaptioner, TransformersCaptioner, make_captioner
from diffalign.annotation.perturbers import (
    LEVELS,
    RulePerturber,
    ShapesPerturber,
    TransformersPerturber,
)
from diffalign.annotation.recaption import recaption
from diffalign.data import convert
from diffalign.errors import ConfigError, UserError
from diffalign.shapes.prompts import ATTRIBUTES, Scene, parse_prompt, train_prompts
from diffalign.shapes.renderer import render

PROMPT = "a small red circle on the left of a gray background"


def shapes_rows(count: int = 6) -> list[dict]:
    """Pairs: the prompt's own image against one of another scene."""
    prompts = train_prompts()
    images = [render(parse_prompt(prompt)) for prompt in prompts[: count + 1]]
    return [
        {"prompt": prompts[i], "chosen": images[i], "rejected": images[i + 1]} for i in range(count)
    ]


def captions(folder: Path) -> list[tuple[str, str]]:
    return [group.prompts for group in load_preferences(folder / "data", verbose=False)]  # type: ignore[misc]


def upper(texts: Sequence[str]) -> list[str]:
    return [text.upper() for text in texts]


class Numbered:
    """Counts its calls."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen, self.stop_after = 0, stop_after

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        assert all(image.mode == "RGB" for image in images)
        self.seen += len(images)
        return [
            f"seen {image.getpixel((2, 2))} for {prompt}"
            for image, prompt in zip(images, prompts, strict=True)
        ]


@pytest.mark.parametrize("strategy", ["c", "p", "h"])
@pytest.mark.parametrize("perturb", ["rejected", "chosen"])
def test_strategies(tmp_path: Path, strategy: str, perturb: str) -> None:
    rows = shapes_rows()
    said = recaption(
        rows,
        tmp_path / "out",
        strategy,
        captioner=ShapesCaptioner(),
        perturber=upper,
        perturb=perturb,
    )
    assert f"6 of 6 pairs recaptioned (strategy {strategy})" in said
    prompts = [row["prompt"] for row in rows]
    others = [train_prompts()[i + 1] for i in range(len(rows))]
    expected = {
        "c": list(zip(prompts, others, strict=True)),
        "p": [(p, p.upper()) for p in prompts],
        "h": [
            (p, (o if perturb == "rejected" else p).upper())
            for p, o in zip(prompts, others, strict=True)
        ],
    }[strategy]
    assert captions(tmp_path / "out") == expected
    data = load_preferences(tmp_path / "out" / "data", verbose=False)
    assert data.has_two_prompts and data.dataset["prompt"][:] == prompts  # the base caption is kept
    for group, row in zip(data, rows, strict=True):
        assert [image.tobytes() for image in group.open_images()] == [
            row[side].tobytes() for side in ("chosen", "rejected")
        ]


def test_ranked_lists_become_pairs_of_their_ends(tmp_path: Path) -> None:
    scenes = [parse_prompt(prompt) for prompt in train_prompts()[:3]]
    rows = [
        {
            "prompt": scenes[0].prompt,
            "images": [render(s) for s in scenes],
            "scores": [0.5, 0.1, 0.9],
        }
    ]
    recaption(rows, tmp_path / "out", "c", captioner=ShapesCaptioner())
    assert captions(tmp_path / "out") == [(scenes[2].prompt, scenes[1].prompt)]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    rows = shapes_rows(5)
    with pytest.raises(KeyboardInterrupt):
        recaption(
            rows,
            tmp_path / "out",
            "c",
            captioner=Numbered(stop_after=4),
            names=("n", ""),
            batch_size=2,
        )
    assert not (tmp_path / "out" / "data").exists()
    with (tmp_path / "out" / "texts.jsonl").open("a") as file:
        file.write('{"key": "torn')
    again = Numbered()
    recaption(rows, tmp_path / "out", "c", captioner=again, names=("n", ""), batch_size=2)
    recaption(rows, tmp_path / "straight", "c", captioner=Numbered(), names=("n", ""), batch_size=2)
    assert again.seen == 10 - 4 and captions(tmp_path / "out") == captions(tmp_path / "straight")
    # Another strategy in the same folder reads no image again; another captioner does.
    idle, other = Numbered(), Numbered()
    recaption(rows, tmp_path / "out", "h", captioner=idle, perturber=upper, names=("n", "upper"))
    recaption(rows, tmp_path / "out", "c", captioner=other, names=("m", ""))
    assert idle.seen == 0 and other.seen == 10


def test_an_image_is_read_once_per_prompt(tmp_path: Path) -> None:
    rows = [shapes_rows(1)[0]] * 3
    captioner = Numbered()
    recaption(rows, tmp_path / "out", "c", captioner=captioner)
    assert captioner.seen == 2 and len(captions(tmp_path / "out")) == 3


@pytest.mark.parametrize("level", LEVELS)
def test_rules_change_as_many_attributes_as_asked(level: str) -> None:
    many = {"weak": 1, "medium": 2, "strong": 4}[level]
    shapes = ShapesPerturber(level)
    for prompt in train_prompts()[:40]:
        before, after = parse_prompt(prompt), parse_prompt(shapes([prompt])[0])
        assert sum(getattr(before, name) != getattr(after, name) for name in ATTRIBUTES) == many
    text = "A large red wooden house behind two white dogs at night"
    words = RulePerturber(level)([text])[0]
    assert sum(
        a != b
        for a, b in zip(text.replace("at night", "night").split(), words.split(), strict=False)
    ) >= min(many, 2)
    assert (
        RulePerturber(level)([text])
        == [words]
        == RulePerturber(level)(["something else", text])[1:]
    )  # whatever is around
    assert len({RulePerturber(level, seed)([text])[0] for seed in range(8)}) > 2
    assert (
        RulePerturber("weak")(["Red"]) != ["Red"] and RulePerturber("weak")(["Red"])[0][0].isupper()
    )
    assert RulePerturber("weak")(["portrait of a redhead"])[0] in (
        "portrait of a",
        "of a redhead",
    )  # whole words only
    assert RulePerturber(level)(["", "hello"]) == ["", ""]


def test_the_shapes_captioner() -> None:
    seen = Scene("large", "blue", "star", "right", "pink")
    captioner = ShapesCaptioner()
    blank = Image.new("RGB", (64, 64), "white")
    assert captioner([render(seen), blank], [PROMPT, PROMPT]) == [seen.prompt, ""]
    with pytest.raises(UserError, match="shapes world only"):
        captioner([blank], ["a photo of a cat"])
    with pytest.raises(UserError, match="shapes world only"):
        ShapesPerturber()(["a photo of a cat"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models with real tokenizers: BLIP, LLaVA (asked through its chat
    template), T5 and GPT-2."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models")
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<image>",
        *sorted({w for p in train_prompts() for w in p.split()}),
    ]
    words += [
        "USER",
        "ASSISTANT",
        ":",
        "paraphrase",
        "lexical",
        "order",
        "40",
        "60",
        "20",
        "100",
        "=",
        ",",
    ]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<image>"], **special
    )
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 16, "patch_size": 8}
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    size = {"height": 16, "width": 16}

    blip = t.BlipConfig(
        vision_config=vision,
        text_config={
            **small,
            **ids,
            "sep_token_id": 2,
            "vocab_size": len(words),
            "encoder_hidden_size": 16,
        },
        projection_dim=16,
    )
    t.BlipForConditionalGeneration(blip).save_pretrained(folder / "blip")
    t.BlipProcessor(t.BlipImageProcessor(size=size), tokenizer).save_pretrained(folder / "blip")

    llava = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**vision),
        text_config=t.LlamaConfig(
            **small,
            **ids,
            vocab_size=len(words),
            num_key_value_heads=2,
            max_position_embeddings=128,
        ),
        image_token_index=words.index("<image>"),
        vision_feature_layer=-1,
    )
    t.LlavaForConditionalGeneration(llava).save_pretrained(folder / "llava")
    chat = (
        "{% for m in messages %}{{ m['role'] | upper }} : {% for c in m['content'] %}{% if "
        "c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor "
        "%} ASSISTANT :"
    )
    pictures = t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    t.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    ).save_pretrained(folder / "llava")

    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": len(words),
    }
    t5 = t.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    t.T5ForConditionalGeneration(t5).save_pretrained(folder / "dipper-tiny")
    tokenizer.save_pretrained(folder / "dipper-tiny")
    t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128, vocab_size=len(words), **ids)
    ).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder


@pytest.mark.parametrize("kind", ["blip", "llava"])
def test_image_to_text_models(models: Path, kind: str) -> None:
    captioner = TransformersCaptioner(str(models / kind), max_new_tokens=8)
    assert captioner.asks == (kind == "llava")
    images = [row["chosen"] for row in shapes_rows(2)]
    found = captioner(images, [PROMPT, PROMPT + " " + PROMPT])
    assert len(found) == 2 and all(isinstance(text, str) and "image" not in text for text in found)
    assert found == captioner(images, [PROMPT, PROMPT + " " + PROMPT])
    assert captioner(images[:1], [PROMPT]) == found[:1]  # padding does not change a caption


@pytest.mark.parametrize("kind", ["dipper-tiny", "gpt2"])
def test_paraphrase_models(models: Path, kind: str) -> None:
    perturber = TransformersPerturber(str(models / kind), "medium", max_length=8)
    assert ("lexical" in perturber.template) == (kind == "dipper-tiny")
    before = torch.get_rng_state()
    first = perturber([PROMPT, "a large star"])
    assert (
        first == perturber([PROMPT, "a large star"]) and len(first) == 2
    )  # sampled from a seed of its own
    assert torch.equal(before, torch.get_rng_state())
    seeds = {
        tuple(TransformersPerturber(str(models / kind), "strong", s, max_length=8)([PROMPT]))
        for s in range(4)
    }
    assert len(seeds) > 1


def test_the_command_with_models_and_own_code(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = str(convert(load_preferences(shapes_rows(), verbose=False), tmp_path / "pairs"))
    out = tmp_path / "out"
    common = ["data", "recaption", source, "--output_dir", str(out)]
    assert cli.run([*common, "--strategy", "c", "--captioner", "shapes"]) == 0
    assert (
        cli.run(
            [
                *common,
                "--strategy",
                "h",
                "--captioner",
                "shapes",
                "--perturber",
                "shapes",
                "--level",
                "weak",
            ]
        )
        == 0
    )
    assert "6 of 6 pairs" in capsys.readouterr().out
    for chosen, rejected in captions(out):
        pair = parse_prompt(chosen), parse_prompt(rejected)
        assert pair[0] != pair[1]
    code = tmp_path / "mine.py"
    code.write_text(
        "def caption(images, prompts):\n    return [f'own words on {p}' for p in prompts]\n"
    )
    assert cli.run([*common, "--strategy", "c", "--captioner", f"{code}:caption"]) == 2
    assert "--trust_remote_code" in capsys.readouterr().err
    assert (
        cli.run(
            [*common, "--strategy", "c", "--captioner", f"{code}:caption", "--trust_remote_code"]
        )
        == 0
    )
    assert captions(out)[0][0].startswith("own words on a ")
    arguments = [
        *common,
        "--strategy",
        "p",
        "--perturber",
        str(models / "gpt2"),
        "--max_empty_fraction",
        "1.0",
    ]
    assert cli.run(arguments) == 0


@pytest.mark.parametrize("strategy", ["c", "h"])
def test_a_broken_image_costs_its_pair(strategy: str, tmp_path: Path) -> None:
    """A whole header, broken pixels: the row is named, the others are captioned."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = []
    for i, row in enumerate(shapes_rows(12)):
        for side in ("chosen", "rejected"):
            row[side].save(folder / f"{i}-{side}.png")
        rows.append(
            {"prompt": row["prompt"], "chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"}
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("3-rejected.png", "5-chosen.png"):
        file = folder / name
        file.write_bytes(file.read_bytes()[:120])
    data = load_preferences(folder, verbose=False, verify_images="header")
    options = {"captioner": Numbered(), "perturber": upper, "batch_size": 4}
    with pytest.raises(
        UserError,
        match="2 of 12 pairs got no caption.*2 have an image that cannot be read, e.g. dataset row",
    ):
        recaption(data, tmp_path / "out", strategy, **options)  # type: ignore[arg-type]
    said = recaption(data, tmp_path / "out", strategy, max_empty_fraction=0.2, **options)  # type: ignore[arg-type]
    assert (
        "10 of 12 pairs recaptioned" in said
        and "2 of these have an image that cannot be read, e.g. dataset row" in said
    )
    seen = options["captioner"].seen  # type: ignore[attr-defined]
    again = recaption(data, tmp_path / "out", strategy, max_empty_fraction=0.2, **options)  # type: ignore[arg-type]
    assert again == said and options["captioner"].seen == seen  # type: ignore[attr-defined]  # nothing is captioned twice
    left = [row["prompt"] for i, row in enumerate(rows) if i not in (3, 5)]
    found = [row["prompt"] for row in load_dataset(str(tmp_path / "out" / "data"), split="train")]
    assert found == left


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "empty": lambda file: file.write_bytes(b""),
    "web page": lambda file: file.write_text("<!DOCTYPE html><html></html>"),
    "pointer": lambda file: file.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    ),
    "gone": lambda file: file.unlink(),
    "lacking": lambda file: save_file(
        dict(list(load_file(file).items())[3:]), file, metadata={"format": "pt"}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["blip", "llava", "dipper-tiny", "gpt2"])
def test_a_damaged_model_is_one_sentence(
    damage: str, kind: str, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / kind
    shutil.copytree(models / kind, folder)
    DAMAGE[damage](folder / "model.safetensors")
    make = TransformersCaptioner if kind in ("blip", "llava") else TransformersPerturber
    with pytest.raises(UserError, match="^--(captioner|perturber): ") as caught:
        make(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"model_type": "none"}',
        '{"model_type": "gpt2", "n_head": 0}',
        '{"vocab_size": "x"}',
    ],
)
def test_a_senseless_model_config_is_one_sentence(
    text: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = str(convert(load_preferences(shapes_rows(), verbose=False), tmp_path / "pairs"))
    common = ["data", "recaption", source, "--output_dir", str(tmp_path / "out")]
    for option, strategy, kind in (("--captioner", "c", "blip"), ("--perturber", "p", "gpt2")):
        folder = tmp_path / kind
        shutil.copytree(models / kind, folder)
        (folder / "config.json").write_text(text)
        assert cli.run([*common, "--strategy", strategy, option, str(folder)]) == 2
        said = capsys.readouterr().err
        assert option in said and "Traceback" not in said


def test_own_code_that_fails_is_one_sentence(tmp_path: Path) -> None:
    for number, code in enumerate(
        ["def caption(:", "1 / 0", "import nothing_of_that_name", "x = 1"]
    ):
        file = tmp_path / f"mine{number}.py"
        file.write_text(code)
        with pytest.raises(UserError, match="--captioner: cannot load"):
            make_captioner(f"{file}:caption", trust_remote_code=True)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = shapes_rows(3)

    def fails(
        words: str,
        captioner: object = None,
        strategy: str = "c",
        source: object = rows,
        **options: object,
    ) -> None:
        with pytest.raises(UserError, match=words):
            recaption(source, tmp_path / "out", strategy, captioner=captioner, **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out" / "data").exists()

    fails("returned nothing for 6 inputs", lambda images, prompts: None)
    fails("returned 1 texts for 6 inputs", lambda images, prompts: ["x"])
    fails("expected texts", lambda images, prompts: [3] * len(images))
    fails(
        r"3 of 3 pairs got no caption.*another captioner",
        lambda images, prompts: [""] * len(images),
        names=("empty", ""),
    )
    fails("captioner: strategy c needs one")
    fails("perturber: strategy p needs one", strategy="p")
    fails("strategy: expected one of c, p, h", strategy="x")
    fails("holds prompt data", ShapesCaptioner(), source=[{"prompt": PROMPT}])
    fails("no changed one", strategy="p", perturber=lambda texts: list(texts), names=("", "same"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        recaption(rows, tmp_path / "full", "c", captioner=ShapesCaptioner())
    # A few without a caption are left out and counted.
    some = recaption(
        rows,
        tmp_path / "some",
        "c",
        captioner=lambda images, prompts: ["" if i == 0 else f"{i}" for i in range(len(images))],
        max_empty_fraction=0.5,
    )
    assert "2 of 3 pairs" in some and "1 left out without a caption" in some
    assert (
        cli.run(["data", "recaption", "x", "--output_dir", str(tmp_path / "o"), "--strategy", "c"])
        == 2
    )
    assert "--captioner: strategy c needs one" in capsys.readouterr().err
    with pytest.raises(UserError, match="has two captions per pair already"):
        recaption(
            str(tmp_path / "some" / "data"), tmp_path / "twice", "c", captioner=ShapesCaptioner()
        )
    convert(load_preferences(rows, verbose=False), tmp_path / "plain")
    arguments = [
        "data",
        "recaption",
        str(tmp_path / "plain"),
        "--output_dir",
        str(tmp_path / "o"),
        "--strategy",
        "c",
    ]
    assert cli.run([*arguments, "--captioner", str(tmp_path / "nothing")]) == 2
    assert "--captioner: cannot load" in capsys.readouterr().err
    assert cli.run([*arguments, "--captioner", "no.such:thing"]) == 2
    with pytest.raises(ConfigError, match="level: expected one of weak, medium, strong"):
        RulePerturber("huge")
    assert make_captioner("shapes")([pair_rows(1)[0]["chosen"]], [PROMPT]) is not None


def test_texts_are_one_json_object_per_line(tmp_path: Path) -> None:
    recaption(
        shapes_rows(2), tmp_path, "p", perturber=lambda texts: [f"ünï\n{text}" for text in texts]
    )
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["text"].startswith("ünï a ") for line in lines)
