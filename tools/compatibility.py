"""Write the table of docs/models.md from the tests: ``python -m tools.compatibility``.

The tests of `tests/backbones` and one common test are run, the nightly ones too, and
the table says what passed. It takes about ten minutes on two CPU cores. ``--results
FILE`` reads the JUnit file of an earlier run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"
COMMON = "tests/methods/test_common.py::test_steps_train_all_that_is_trainable_and_nothing_else"
FAMILIES = {
    "sd": "Stable Diffusion 1.x (epsilon)",
    "sd_v": "Stable Diffusion 2.x (v)",
    "sdxl": "SDXL",
    "sd3": "SD3, SD3.5",
    "flux": "Flux.1-dev, Krea-dev",
    "flux-schnell": "Flux.1-schnell",
    "chroma": "Chroma",
    "flux2-klein": "Flux.2 klein base",
    "flux2-klein-distilled": "Flux.2 klein, distilled",
    "z-image": "Z-Image",
    "qwen-image": "Qwen-Image, 2512",
    "qwen-image-21": "Qwen-Image 2.1",
    "sana": "Sana",
    "pixart": "PixArt-Sigma",
}
"""Name in the tests -> name in the table."""
METHODS = {
    "awm": "AWM", "ctrl_u": "Ctrl-U", "d3po": "D3PO", "dcpo": "DCPO", "dgpo": "DGPO",
    "diffusion_dpo": "DPO", "diffusion_dro": "DRO", "diffusion_kto": "KTO",
    "diffusion_nft": "NFT", "diffusion_npo": "NPO", "diffusion_orpo": "ORPO",
    "grpo": "GRPO", "mapo": "MaPO", "ppd": "PPD", "rankdpo": "RankDPO",
    "reward_backprop": "reward gradient", "self_npo": "Self-NPO", "seppo": "SePPO",
    "sft": "SFT", "spo": "SPO",
}  # fmt: skip
"""Name of the method -> heading of its column."""
CHECKS = {
    "test_the_network_gets_the_arguments_of_the_pipeline": "calls its network as its pipeline",
    "test_a_rollout_is_what_the_pipeline_draws": "rollouts equal the pipeline",
    "test_a_lora_loads_into_the_plain_pipeline": "LoRA in the plain pipeline",
    "test_one_steered_particle_is_the_pipelines_image": "steering",
    "test_mixed_sizes_train_in_buckets": "mixed sizes",
    "test_bf16_keeps_trainable_weights_and_errors_in_float32": "bf16, checkpointed activations",
    "test_two_processes_are_one_process": "two processes equal one",
}
"""Test -> heading of its column."""


def run_tests(file: Path) -> None:
    """Run the tests and write their results as a JUnit file."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "nightly or not nightly"]
    command += ["--junitxml", str(file), "tests/backbones", COMMON]
    subprocess.run(command, cwd=ROOT, check=False)


def read_results(file: Path) -> dict[str, dict[str, bool]]:
    """Read a JUnit file.

    Returns:
        `dict`: test -> parameters as pytest writes them -> whether it passed. Skipped
        cases are left out.
    """
    results: dict[str, dict[str, bool]] = defaultdict(dict)
    # Written by pytest in this process's own folder, or named by the user.
    for case in ElementTree.parse(file).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
        if match is None or case.find("skipped") is not None:
            continue
        passed = case.find("failure") is None and case.find("error") is None
        results[match[1]][match[2]] = passed
    return results


def mark(passed: bool | None) -> str:
    """yes, no, or nothing where no test ran."""
    return "" if passed is None else "yes" if passed else "**no**"


def table(results: dict[str, dict[str, bool]]) -> list[str]:
    """The two tables as lines of Markdown."""
    trained: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for test in (
        "test_every_method_trains_on_every_family",
        COMMON.rpartition("::")[2],
    ):
        for parameters, passed in results[test].items():
            parts = re.sub(r"^(lora|full)-", "", parameters)
            for method in METHODS:
                for family in FAMILIES:
                    if parts in (f"{family}-{method}", f"{method}-{family}"):
                        trained[family, method].append(passed)
    lines = [f"| family | {' | '.join(METHODS.values())} |", "|---" * (len(METHODS) + 1) + "|"]
    for family, title in FAMILIES.items():
        cells = [
            mark(all(trained[family, method]) if trained[family, method] else None)
            for method in METHODS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", f"| family | {' | '.join(CHECKS.values())} |", "|---" * (len(CHECKS) + 1) + "|"]
    for family, title in FAMILIES.items():
        cells = [mark(results[test].get(family)) for test in CHECKS]
        if family == "pixart":
            cells[2] = "none, refused"
            cells[6] = "not tested"
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="JUnit file of an earlier run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.results or Path(folder) / "results.xml"
        if options.results is None:
            run_tests(file)
        lines = table(read_results(file))
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text("\n".join([head + BEGIN, *lines, END + rest.split(END)[1]]))


if __name__ == "__main__":
    main()
