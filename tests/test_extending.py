"""A method, scorer and family as CONTRIBUTING.md says: one file, one line each."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import diffalign

ROOT = Path(__file__).parents[1]
WEIGHTS = ("weights", "flow_weights", "reward_weights", "lora_weights", "text_weights")


def example(heading: str, document: str = "CONTRIBUTING.md") -> str:
    """The first Python block under a heading of a document."""
    text = (ROOT / document).read_text()
    section = text[text.index(f"## {heading}") :]
    block = re.search(r"^```python\n(.*?)^```", section, re.S | re.M)
    assert block is not None
    return block[1]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that may be added to."""
    source = Path(diffalign.__file__).parent
    copy = tmp_path / "diffalign"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*WEIGHTS, "__pycache__"))
    for name in WEIGHTS:
        (copy / "shapes" / name).symlink_to(source / "shapes" / name)
    return copy


def add_line(file: Path, before: str, line: str) -> None:
    """One line in a table."""
    text = file.read_text()
    assert text.count(before) == 1
    file.write_text(text.replace(before, f"    {line},\n{before}"))


def run(package: Path, code: str) -> str:
    paths = f"import sys; sys.path[:0] = [{str(package.parent)!r}, {str(ROOT / 'tests')!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", paths + textwrap.dedent(code)],
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.nightly
def test_a_method(package: Path) -> None:
    block = example("A method is one file")
    (package / "methods" / "slic.py").write_text(block[: block.index("\ntrainer = ")])
    table = package / "methods" / "__init__.py"
    add_line(table, '    "sft": "sft:SFT",\n', '"slic": "slic:SLiC"')
    said = run(
        package,
        """
        from datasets import Dataset
        from tiny import pair_rows

        from diffalign.cli import run

        Dataset.from_list(pair_rows(4, size=64)).to_parquet("pairs.parquet")
        options = {"data.dataset_name": "pairs.parquet", "train.output_dir": "run",
                   "train.max_steps": 2, "train.per_device_train_batch_size": 2,
                   "train.beta": 500, "lora.r": 4}
        parts = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        assert run(["train", "--method", "slic", "--model", "shapes", *parts]) == 0
        assert "method: slic" in open("run/config.yaml").read()
        assert run(["train", "--method", "slic", "--model", "shapes", "--train.beta", "-1"]) == 2
        """,
    )
    assert "SLiC on shapes" in said and "done: run" in said


@pytest.mark.nightly
def test_a_scorer(package: Path) -> None:
    file = package / "rewards" / "scorers" / "brightness.py"
    file.write_text(example("A reward is a function, or one file"))
    table = package / "rewards" / "registry.py"
    line = '"brightness": "scorers.brightness:Brightness"'
    add_line(table, '    "imagereward": "scorers.imagereward:ImageReward",\n', line)
    said = run(
        package,
        """
        from tiny import picture

        from diffalign import load_scorer
        from diffalign.cli import run

        bright, dark = load_scorer("brightness")([picture(200, 0), picture(20, 1)])
        assert bright > 150 > dark
        assert run(["scorers", "brightness"]) == 0
        """,
    )
    assert "mean of the pixels" in said


@pytest.mark.nightly
def test_a_model_family(package: Path) -> None:
    (package / "backbones" / "toy.py").write_text(example("A model family is one file"))
    table = package / "backbones" / "__init__.py"
    line = '"ToyPipeline": "toy:ToyBackbone"'
    add_line(table, '    "StableDiffusionPipeline": "sd:StableDiffusionBackbone",\n', line)
    run(
        package,
        """
        from diffusers import StableDiffusionPipeline
        from tiny import build_pipeline, lora_config, make_trainer

        class ToyPipeline(StableDiffusionPipeline):
            pass

        parts = {**build_pipeline("sd").components, "requires_safety_checker": False}
        trainer = make_trainer("run", model=ToyPipeline(**parts), peft_config=lora_config())
        trainer.train()
        assert type(trainer.backbone).__name__ == "ToyBackbone"
        """,
    )


@pytest.mark.nightly
def test_the_guide_for_a_model_family(package: Path) -> None:
    """Lumina 2 as docs/guides/new-model.md writes it, compared with its pipeline."""
    guide = "docs/guides/new-model.md"
    (package / "backbones" / "lumina2.py").write_text(example("2. Write the file", guide))
    match = re.search(r'`("Lumina2Pipeline": "[^`]+")`', (ROOT / guide).read_text())
    assert match is not None
    line = match[1]
    table = package / "backbones" / "__init__.py"
    add_line(table, '    "StableDiffusionPipeline": "sd:StableDiffusionBackbone",\n', line)
    run(
        package,
        f"""
        sys.path.insert(0, {str(ROOT / "tests" / "backbones")!r})
        from pathlib import Path

        import diffusers
        import tiny_families
        import transformers
        from tiny import small_vae

        def lumina():
            transformer = diffusers.Lumina2Transformer2DModel(
                sample_size=4, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
                num_attention_heads=1, num_kv_heads=1, multiple_of=8, axes_dim_rope=(8, 8, 8),
                axes_lens=(300, 64, 64), cap_feat_dim=16,
            )
            pipe = diffusers.Lumina2Pipeline(
                transformer=transformer,
                scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
                vae=small_vae(shift_factor=0.1),
                text_encoder=transformers.Gemma2Model(
                    transformers.Gemma2Config(**tiny_families._language_model())
                ),
                tokenizer=tiny_families.byte_tokenizer(),
            )
            pipe.vae_scale_factor = 2  # of the tiny autoencoder; the pipeline says 8
            return pipe

        tiny_families._BUILDERS["lumina2"] = lumina
        import test_families as families

        families.test_the_network_gets_the_arguments_of_the_pipeline("lumina2")
        families.test_decoding_is_the_pipelines("lumina2")
        families.test_rows_of_a_batch_are_rows_alone("lumina2")
        families.test_a_lora_loads_into_the_plain_pipeline("lumina2", Path("lora"))
        families.test_a_rollout_is_what_the_pipeline_draws("lumina2", Path("rollout"))
        families.test_one_steered_particle_is_the_pipelines_image("lumina2")
        families.test_particles_are_scored_and_resampled("lumina2")
        """,
    )
