"""The wheel carries the embedded weights and works in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".git")
    shutil.copytree(ROOT / "diffalign", folder / "source" / "diffalign", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("diffalign-*.whl"))


def test_the_wheel_holds_weights_types_and_settings(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "diffalign/py.typed",
        "diffalign/accelerate_configs/fsdp2.yaml",
        "diffalign/shapes/weights/model_index.json",
        "diffalign/shapes/weights/unet/diffusion_pytorch_model.safetensors",
        "diffalign/shapes/weights/vae/diffusion_pytorch_model.safetensors",
        "diffalign/shapes/weights/text_encoder/model.safetensors",
        "diffalign/shapes/weights/tokenizer/tokenizer.json",
        "diffalign/shapes/weights/scheduler/scheduler_config.json",
        "diffalign/shapes/reward_weights/model.safetensors",
        "diffalign/shapes/reward_weights/tokenizer.json",
        "diffalign/shapes/lora_weights/pytorch_lora_weights.safetensors",
        "diffalign/rewards/testing/reference.json",
        "diffalign/evaluation/templates/report.html",
        "diffalign/training/online/templates/round.html",
    ):
        assert expected in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "configs/", "tools/"))]


@pytest.mark.nightly
def test_it_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The environment sees the running one's dependencies, but not the source tree."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    here = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for entry in (
        here.iterdir()
    ):  # everything that is installed, except the package itself and editable hooks
        if "diffalign" not in entry.name and entry.suffix != ".pth":
            (dependencies / entry.name).symlink_to(entry)
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    python = [str(tmp_path / "venv" / "bin" / "python"), "-c"]

    def run(code: str, **extra: str) -> str:
        done = subprocess.run(
            [*python, code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment, **extra},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "site-packages" in run("import diffalign; print(diffalign.__file__)")
    code = (
        "import diffalign.cli.entry, sys; sys.argv = ['diffalign', '--help']; diffalign.cli.main()"
    )
    assert "quickstart" in run(code, PYTHONPATH=str(dependencies))
    load = (
        "from diffalign.backbones import load_backbone; import torch; b = load_backbone('shapes'); "
        "print(sum(p.numel() for p in b.load_network(torch.float32).parameters()))"
    )
    assert int(run(load, PYTHONPATH=str(dependencies)).split()[-1]) > 4_000_000


def test_nothing_is_imported_that_is_not_installed() -> None:
    """Also inside of functions: a package of the tests alone is not there for users."""
    import ast
    import re
    from importlib.metadata import metadata, requires

    from packaging.requirements import Requirement

    extras = metadata("diffalign").get_all("Provides-Extra") or []
    users = ["", *(name for name in extras if name not in ("test", "docs", "dev"))]
    declared = [
        requirement
        for requirement in map(Requirement, requires("diffalign") or [])
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in users)
    ]
    names = {re.sub(r"[-_.]+", "_", requirement.name.lower()) for requirement in declared}
    modules = {"pillow": "PIL", "pyyaml": "yaml", "open_clip_torch": "open_clip"}
    known = {modules.get(name, name) for name in names} | {*sys.stdlib_module_names, "diffalign"}
    # Come with packages that are declared, or are asked for in a sentence.
    known |= {"pydantic_core", "pyarrow", "fsspec", "packaging", "starlette", "tokenizers"}
    known |= {"filelock", "_typeshed", "pandas", "rich"}
    found: dict[str, str] = {}
    for path in (ROOT / "diffalign").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [node.module or ""]
            for name in imported:
                if name.split(".")[0] not in known:
                    found[name.split(".")[0]] = str(path.relative_to(ROOT))
    assert found == {}
