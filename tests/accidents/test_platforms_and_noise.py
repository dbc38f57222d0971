"""Systems that lack Unix modules, and words that frighten without cause.

The modules are blocked for the package alone: its dependencies ask the system which one
it is, and this one is Unix.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from tiny import build_pipeline, lora_config, make_trainer

import diffalign.cli.entry

BLOCKED = ["resource", "fcntl", "termios", "pwd", "grp", "syslog"]

SCRIPT = """
import sys
import builtins
plain = builtins.__import__
def blocked(name, globals=None, *rest, **more):
    if name in {blocked} and str((globals or {{}}).get("__name__", "")).startswith("diffalign"):
        raise ImportError(name)
    return plain(name, globals, *rest, **more)
builtins.__import__ = blocked
sys.path.insert(0, {tests!r})
import pkgutil, importlib, diffalign
for module in pkgutil.walk_packages(diffalign.__path__, "diffalign."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
{then}
print("fine")
"""


def python(then: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(blocked=BLOCKED, tests=str(Path(__file__).parents[1]), then=then)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=300
    )


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["diffusion_dpo", "mapo"])
def test_the_package_trains_without_unix_modules(method, tmp_path):
    then = (
        f"from tiny import make_trainer, lora_config\nmake_trainer('run', method={method!r}, "
        "peft_config=lora_config(), max_steps=1).train()"
    )
    done = python(then, tmp_path)
    assert done.returncode == 0 and done.stdout.strip().endswith("fine"), done.stderr[-2000:]
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.nightly
def test_every_module_is_imported_without_them(tmp_path):
    done = python("", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.nightly
def test_commands_without_them(tmp_path):
    done = python(
        "from diffalign.cli.entry import run\nassert run(['env']) == 0\nassert run(['scorers']) == "
        "0",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.nightly
def test_a_lora_without_a_text_encoder_is_no_warning(tmp_path):
    build_pipeline("sd").save_pretrained(tmp_path / "m")
    make_trainer(tmp_path / "run", peft_config=lora_config(), max_steps=1).train()
    done = run(
        "diffalign",
        "sample",
        "--model",
        tmp_path / "m",
        "--lora",
        tmp_path / "run",
        "--prompt",
        "a",
        "--num_images",
        1,
        "--num_inference_steps",
        2,
        "--output_dir",
        "o",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for word in ("No LoRA keys", "open an issue", "Traceback", "RuntimeWarning"):
        assert word not in done.stderr + done.stdout


@pytest.mark.nightly
def test_progress_in_a_file_is_short(tmp_path):
    done = run(
        "diffalign",
        "sample",
        "--prompt",
        "a small red circle on the left of a gray background",
        "--num_images",
        8,
        "--batch_size",
        1,
        "--num_inference_steps",
        5,
        "--output_dir",
        "o",
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert (done.stdout + done.stderr).count("base") <= 4 and "Loading weights" not in done.stderr


def test_the_reasons_of_broken_rows_reach_the_user(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "image": "img\\\\\\\\gone.png"}\n' * 3)
    assert diffalign.cli.entry.run(["data", "inspect", "a.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "does not exist" in said and "row 0" in said
