"""Shared by the generators: arguments, stand-ins for imports that the numbers do not
need, definitions out of scripts, output."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import platform
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(
    0, str(HERE.parents[2])
)  # so that diffalign.rewards.testing.reference_models can be imported without installing
torch.set_num_threads(1)
STRIDE = 16  # of the stored pixels


def arguments(description: str, **extra: str) -> argparse.Namespace:
    """--source CHECKOUT --out FOLDER, and required paths named in `extra`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--source", type=Path, required=True, help="checkout of the original repository"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "fixtures", help="folder of the fixtures"
    )
    for name, text in extra.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    options = parser.parse_args()
    options.source = options.source.resolve()
    return options


def source_of(checkout: Path, repository: str, *packages: str, note: str = "") -> dict[str, str]:
    """What the fixture was computed by: repository, commit, versions."""
    run = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], stdout=subprocess.PIPE, check=True
    )
    facts = {
        "repository": repository,
        "commit": run.stdout.decode().strip(),
        "python": platform.python_version(),
    }
    facts.update({"numpy": np.__version__, "pillow": PIL.__version__, "torch": torch.__version__})
    facts.update({name: importlib.import_module(name).__version__ for name in packages})
    return {**facts, "note": note} if note else facts


class _Anything(types.ModuleType):
    """A module any name can be imported from; what it gives out is never used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *a, **k: None})


def stub(*names: str) -> None:
    """Puts stand-ins into sys.modules."""
    for name in names:
        sys.modules[name] = _Anything(name)
        sys.modules[name].__path__ = []


def bare_package(name: str, folder: Path) -> None:
    """Makes a folder importable as a package without running its __init__."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def definitions(file: Path, names: set, namespace: dict[str, Any]) -> dict[str, Any]:
    """Runs only the named classes and functions of a script, notebook or README whose
    top level cannot run here."""
    code = file.read_text()
    if file.suffix == ".ipynb":
        code = "\n".join(
            "".join(c["source"]) for c in json.loads(code)["cells"] if c["cell_type"] == "code"
        )
    elif file.suffix == ".md":
        code = next(
            block
            for block in code.split("```")[1::2]
            if all(f"def {name}" in block for name in names)
        )[len("python") :]
    code = "\n".join(line for line in code.split("\n") if not line.lstrip().startswith(("!", "%")))
    kept = [node for node in ast.parse(code).body if getattr(node, "name", None) in names]
    assert {node.name for node in kept} == names, f"{file} lacks {names}"
    exec(compile(ast.Module(body=kept, type_ignores=[]), str(file), "exec"), namespace)
    return namespace


def sha256(array: np.ndarray) -> str:
    """Of the bytes of an array in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def strided(array: Any) -> np.ndarray:
    """Every STRIDE-th pixel of (..., H, W)."""
    return np.ascontiguousarray(np.asarray(array)[..., ::STRIDE, ::STRIDE])


def write(
    folder: Path, name: str, numbers: dict[str, Any], arrays: dict[str, np.ndarray] | None = None
) -> None:
    """`name.json`, and the arrays as `name.npz`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(compact(numbers) + "\n", encoding="utf-8")
    if arrays:
        np.savez_compressed(folder / f"{name}.npz", **arrays)


def compact(value: Any, depth: int = 0) -> str:
    """JSON with one line for each innermost list and one for each key of a mapping."""
    if isinstance(value, dict) and depth < 2:
        rows = [
            f"{' ' * (depth + 1)}{json.dumps(k)}: {compact(v, depth + 1)}" for k, v in value.items()
        ]
        return "{\n" + ",\n".join(rows) + "\n" + " " * depth + "}"
    if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
        pad = " " * (depth + 1)
        return (
            "[\n"
            + ",\n".join(pad + json.dumps(row, ensure_ascii=True) for row in value)
            + "\n"
            + " " * depth
            + "]"
        )
    return json.dumps(value, ensure_ascii=True)
