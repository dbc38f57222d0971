"""The methods on the shapes world, with equal evaluation.

    python benchmarks/methods.py [--seeds 3] [--methods NAME ...] [--work FOLDER]
        [--output benchmarks/methods.md]

600 training prompts, six images each from the base, judged by the verifier
(`diffalign data build`); DCPO gets the recaptioned copy (`diffalign data recaption`),
Self-NPO the prompts alone, SePPO rendered winners, D3PO, SPO and online Diffusion-DPO
the prompts and a judge. Every method is trained as its `configs/<method>/shapes.yaml`
says, from three seeds. Settings were chosen on the first 60 held-out prompts; what is
reported are the other 60, eight images each, with the same noise as the base: accuracy
(all five attributes right) and the share of pairs that the verifier's graded score
gives to the trained model (ties count one half), with an interval clustered by prompt.
Negative models are used in guidance, and compared with the base at its own best
guidance scale; both scales are those that win most often against the base at its usual
scale on the first 60. Finished parts lie in --work: an interrupted run goes on, and two
processes can share the work by --methods. About three hours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import online_methods
import torch
from tqdm.auto import tqdm

from diffalign import NegativeGuidance, cli
from diffalign.evaluation.statistics import clustered_bootstrap, win_rate
from diffalign.generation.pipelines import base_pipeline
from diffalign.generation.sampling import generate
from diffalign.recipe import build_trainer, load_run
from diffalign.runtime.files import write_atomically
from diffalign.shapes.prompts import held_out_prompts
from diffalign.shapes.sampling_defaults import SAMPLING
from diffalign.shapes.verifier import attribute_table, score

ROOT = Path(__file__).parents[1]
IMAGES, TUNING_IMAGES = 8, 4
FIRST_SEED = 20_000_000
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
NEGATIVE_SCALES = (3.0, 4.0, 5.0)
OFFICIAL = ("--train.start", "data", "--train.loss_type", "huber", "--train.guidance_weight", "-1")


@dataclass(frozen=True)
class Arm:
    """What is trained: a file of configs/, the dataset, options over both, and how it
    is judged."""

    config: str
    dataset: str = "data/ranked"
    overrides: tuple[str, ...] = ()
    kind: str = "offline"  # or negative: used in guidance; or online: draws its own images

    @property
    def from_images(self) -> bool:
        """Whether the dataset's images are read, so that latents are worth keeping."""
        return self.kind != "online" and not (
            self.config.startswith("self_npo") and not self.overrides
        )


ARMS: dict[str, Arm] = {
    "SFT": Arm("sft/shapes"),
    "Diffusion-DPO": Arm("diffusion_dpo/shapes"),
    "RankDPO": Arm("rankdpo/shapes"),
    "MaPO": Arm("mapo/shapes"),
    "DCPO": Arm("dcpo/shapes", "recaptioned/data"),
    "DCPO, captions: chosen (control)": Arm(
        "dcpo/shapes", "recaptioned/data", ("--train.captions", "chosen")
    ),
    "Self-NPO": Arm("self_npo/shapes", kind="negative"),
    "Self-NPO, official code (from images)": Arm(
        "self_npo/shapes", overrides=OFFICIAL, kind="negative"
    ),
    "Diffusion-NPO": Arm("diffusion_npo/shapes", kind="negative"),
    "D3PO, verifier": Arm("d3po/shapes", kind="online"),
    "D3PO, shapes-clip": Arm(
        "d3po/shapes", overrides=("--rewards", online_methods.WATCHED), kind="online"
    ),
    "D3PO, conservative ensemble": Arm(
        "d3po/shapes",
        overrides=("--rewards", online_methods.ENSEMBLE, "--train.compare", "combined"),
        kind="online",
    ),
    "SPO, verifier": Arm("spo/shapes", kind="online"),
    "Online Diffusion-DPO": Arm("diffusion_dpo/shapes_online", kind="online"),
    "SePPO": Arm("seppo/shapes", "rendered"),
    "SFT on the same rendered winners (control)": Arm("sft/shapes", "rendered"),
}
MUST_WIN = (
    "DCPO",
    "RankDPO",
    "MaPO",
    "D3PO, verifier",
    "D3PO, shapes-clip",
    "SPO, verifier",
    "Online Diffusion-DPO",
    "SePPO",
)
DIRECT = (
    ("RankDPO", "Diffusion-DPO"),
    ("DCPO", "DCPO, captions: chosen (control)"),
    ("DCPO", "Diffusion-DPO"),
)


def make_data(work: Path) -> None:
    """The ranked dataset, its recaptioned copy, and the rendered winners."""
    build = [
        "data",
        "build",
        "--prompts",
        "shapes",
        "--models",
        "shapes",
        "--num_images",
        "6",
        "--scorers",
        "shapes",
    ]
    recaption = [
        "data",
        "recaption",
        str(work / "data" / "ranked"),
        "--strategy",
        "h",
        "--captioner",
        "shapes",
    ]
    for command, result, folder in (
        ([*build, "--batch_size", "64"], work / "data" / "ranked", work / "data"),
        (
            [*recaption, "--perturber", "shapes"],
            work / "recaptioned" / "data",
            work / "recaptioned",
        ),
    ):
        if not result.is_dir():
            code = cli.run([*command, "--output_dir", str(folder)])
            if code:
                raise SystemExit(code)
    online_methods.render_winners(work / "rendered")


def judge(
    pipe: Any, prompts: list[str], images: int, first: int, guidance: float | None = None
) -> dict[str, list[list[float]]]:
    """Graded scores and whether all is right, (prompts, images) each."""
    repeated = [prompt for prompt in prompts for _ in range(images)]
    settings = SAMPLING if guidance is None else {**SAMPLING, "guidance_scale": guidance}
    drawn = generate(
        pipe,
        repeated,
        range(first, first + len(repeated)),
        batch_size=60,
        progress=False,
        **settings,
    )
    right = [row["all"] for row in attribute_table(drawn, repeated)]
    shape = (len(prompts), images)
    return {
        "scores": score(drawn, repeated).reshape(shape).tolist(),
        "right": np.array(right, float).reshape(shape).tolist(),
    }


def kept(path: Path, make: Any) -> Any:
    """What `make` returns, from the file where it is there already."""
    if path.is_file():
        return json.loads(path.read_text())
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value).encode())
    return value


def tuning(pipe: Any, scale: float) -> dict[str, Any]:
    return judge(pipe, held_out_prompts()[:60], TUNING_IMAGES, FIRST_SEED - 10_000, scale)


def final(pipe: Any, scale: float | None = None) -> dict[str, Any]:
    return judge(pipe, held_out_prompts()[60:], IMAGES, FIRST_SEED, scale)


def base_results(work: Path) -> dict[str, Any]:
    """The base at the usual guidance scale and at the best on the first 60 prompts."""
    sweep = {
        scale: kept(
            work / "base" / f"tuning-{scale}.json", lambda s=scale: tuning(base_pipeline(), s)
        )
        for scale in SCALES
    }
    best = best_scale(sweep, sweep[SAMPLING["guidance_scale"]])
    return {
        "default": kept(work / "base" / "test.json", lambda: final(base_pipeline())),
        "best_scale": best,
        "best": kept(work / "base" / f"test-{best}.json", lambda: final(base_pipeline(), best)),
        "sweep": {
            s: [float(np.mean(v["right"])), float(np.mean(v["scores"]))] for s, v in sweep.items()
        },
    }


def best_scale(sweep: dict[float, dict[str, Any]], usual: dict[str, Any]) -> float:
    """The guidance scale that wins most often against the base at its usual one."""
    base = np.array(usual["scores"])
    return max(sweep, key=lambda scale: win_rate(base, np.array(sweep[scale]["scores"])).rate)


def train(name: str, seed: int, work: Path) -> dict[str, Any]:
    """Trains one arm; returns seconds and steps."""
    arm = ARMS[name]
    out = work / "runs" / f"{folder_name(name)}-{seed}"
    options = {
        "data.dataset_name": work / arm.dataset,
        "data.cache_text_embeddings": work / "cache",
        "train.output_dir": out,
        "train.seed": seed,
        "train.overwrite_output_dir": "true",
        "train.save_steps": 100_000,
        "train.logging_steps": 4 if arm.kind == "online" else 50,
    }
    if arm.from_images:
        options["data.cache_latents"] = work / "cache"
    arguments = [str(x) for key, value in options.items() for x in (f"--{key}", value)]
    overrides = online_methods.filled(arm.overrides, work)
    run = load_run(ROOT / "configs" / f"{arm.config}.yaml", [*arguments, *overrides])
    run.validation = None
    trainer = build_trainer(run)
    started = time.perf_counter()
    output = trainer.train()
    if output.interrupted_by is not None:  # a half-trained arm must not be kept as a finished one
        raise SystemExit(128 + output.interrupted_by)
    return {"seconds": time.perf_counter() - started, "steps": trainer.state.global_step}


def measure(name: str, seed: int, work: Path) -> dict[str, Any]:
    """One arm and seed: trained, and judged on the test prompts."""
    facts = kept(
        work / "results" / f"{folder_name(name)}-{seed}-train.json", lambda: train(name, seed, work)
    )
    folder = work / "runs" / f"{folder_name(name)}-{seed}"

    def judged() -> dict[str, Any]:
        pipe = base_pipeline()
        if ARMS[name].kind != "negative":
            pipe.load_lora_weights(str(folder))
            return final(pipe)
        guidance = NegativeGuidance(pipe, negative=str(folder))
        with guidance:
            sweep = {scale: tuning(pipe, scale) for scale in NEGATIVE_SCALES}
            usual = json.loads(
                (work / "base" / f"tuning-{SAMPLING['guidance_scale']}.json").read_text()
            )
            best = best_scale(sweep, usual)
            means = {
                str(s): [float(np.mean(v["right"])), float(np.mean(v["scores"]))]
                for s, v in sweep.items()
            }
            return {**final(pipe, best), "best_scale": best, "sweep": means}

    return {**facts, **kept(work / "results" / f"{folder_name(name)}-{seed}-test.json", judged)}


def folder_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def accuracy(result: dict[str, Any]) -> str:
    right = np.array(result["right"])
    low, high = clustered_bootstrap(right)
    return f"{100 * right.mean():.1f} ({100 * low:.1f}-{100 * high:.1f})"


def rate(base: dict[str, Any], result: dict[str, Any]) -> tuple[str, bool]:
    found = win_rate(np.array(base["scores"]), np.array(result["scores"]))
    return f"{100 * found.rate:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})", found.low > 0.5


def table(base: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        f"Base at its usual guidance scale {SAMPLING['guidance_scale']:g}: accuracy "
        f"{accuracy(base['default'])} %. At its best, {base['best_scale']:g}: "
        f"{accuracy(base['best'])} %.",
        "",
        "| method | seed | accuracy % | win-rate against the base % | training, s (steps) |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in results.items():
        if ARMS[name].kind == "negative":
            continue
        for seed, result in enumerate(seeds):
            shown, _ = rate(base["default"], result)
            lines.append(
                f"| {name} | {seed} | {accuracy(result)} | {shown} | {result['seconds']:.0f} "
                f"({result['steps']}) |"
            )
    lines += [
        "",
        "Negative models in the unconditional branch (`NegativeGuidance`, alpha irrelevant without "
        "a positive model, beta 1), against the base at its best guidance scale, "
        f"{base['best_scale']:g}:",
        "",
        (
            "| method | seed | guidance scale | accuracy % | win-rate against the base at its best "
            "% | training, s (steps) |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for name, seeds in results.items():
        if ARMS[name].kind != "negative":
            continue
        for seed, result in enumerate(seeds):
            shown, _ = rate(base["best"], result)
            lines.append(
                f"| {name} | {seed} | {result['best_scale']:g} | {accuracy(result)} | {shown} | "
                f"{result['seconds']:.0f} ({result['steps']}) |"
            )
    lines += [
        "",
        "Accuracy % over guidance scales on the 60 tuning prompts (seed 0 of negative models):",
        "",
    ]
    lines += [f"| | {' | '.join(f'{s:g}' for s in SCALES)} |", f"|---|{'---|' * len(SCALES)}"]
    sweeps = {"base": {str(s): v for s, v in base["sweep"].items()}}
    sweeps |= {
        name: seeds[0]["sweep"]
        for name, seeds in results.items()
        if ARMS[name].kind == "negative" and seeds
    }
    for name, sweep in sweeps.items():
        shown = (f"{100 * sweep[str(s)][0]:.1f}" if str(s) in sweep else "" for s in SCALES)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def comparisons(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "",
        "Directly against one another, same prompts and noise, win-rate of the first in %:",
        "",
        "| | seed | win-rate |",
        "|---|---|---|",
    ]
    for first, second in DIRECT:
        for seed, (a, b) in enumerate(
            zip(results.get(first, []), results.get(second, []), strict=False)
        ):
            lines.append(f"| {first} against {second} | {seed} | {rate(b, a)[0]} |")
    return lines


def verdicts(base: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [""]
    for name in MUST_WIN:
        good = [rate(base["default"], result)[1] for result in results.get(name, [])]
        lines.append(
            f"- {name}: the interval lies above 50 % for {sum(good)} of {len(good)} seeds."
        )
    for name, seeds in results.items():
        if ARMS[name].kind == "negative":
            good = [rate(base["best"], result)[1] for result in seeds]
            lines.append(
                f"- {name} against the base at its best scale: the interval lies above 50 % for "
                f"{sum(good)} of {len(good)} seeds."
            )
    return lines


def reading(base: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What the negative models change, image by image, over all seeds: attributes, and
    sharpness where both are right."""
    lines = [
        "",
        "What a negative model changes against the base at its best scale, over all seeds: images "
        "that become fully right and that are no longer, and how often the image is the sharper "
        "one where both are fully right (the graded score then differs by the shape's sharpness "
        "alone):",
        "",
        "| method | become right % | no longer right % | sharper where both are right % |",
        "|---|---|---|---|",
    ]
    right, scores = np.array(base["best"]["right"]) > 0, np.array(base["best"]["scores"])
    for name, seeds in results.items():
        if ARMS[name].kind != "negative":
            continue
        own = np.array([result["right"] for result in seeds]) > 0
        graded = np.array([result["scores"] for result in seeds])
        both = own & right
        sharper = (graded > scores)[both] + 0.5 * (graded == scores)[both]
        gained, lost = 100 * (own & ~right).mean(), 100 * (~own & right).mean()
        lines.append(f"| {name} | {gained:.1f} | {lost:.1f} | {100 * sharper.mean():.1f} |")
    lines += [
        "",
        "In this world what is wrong at the base's best scale is an attribute that the "
        "pre-training captions had wrong. Self-NPO's negative model differs from the base by "
        "smoothness, not by attributes: it can push images towards sharpness, and does so at the "
        "price of some attributes, which evens out. A negative model trained on preferences "
        "(Diffusion-NPO) is asked without a prompt, where it knows nothing of the prompt's "
        "attributes either. On the base's own sampling defaults, at guidance 2, the plain scale is "
        "the stronger knob.",
    ]
    return lines


def test_images(work: Path, folder: Path | None) -> tuple[list[Any], list[str], int]:
    """The images that `final` judges, of the base or of a trained LoRA."""
    pipe = base_pipeline()
    if folder is not None:
        pipe.load_lora_weights(str(folder))
    prompts = [prompt for prompt in held_out_prompts()[60:] for _ in range(IMAGES)]
    seeds = range(FIRST_SEED, FIRST_SEED + len(prompts))
    return (
        generate(pipe, prompts, seeds, batch_size=60, progress=False, **SAMPLING),
        prompts,
        IMAGES,
    )


def online_report(work: Path, names: list[str], seeds: int, picture: Path) -> list[str]:
    """Curves and over-optimisation of the arms that learn from a judge."""

    def scored(name: str, seed: int) -> dict[str, Any]:
        folder = work / "runs" / f"{folder_name(name)}-{seed}" if name else None
        file = (
            work
            / "results"
            / (f"{folder_name(name)}-{seed}-judges.json" if name else "base-judges.json")
        )
        return kept(
            file,
            lambda: online_methods.held_out(name, seed, work, lambda: test_images(work, folder)),
        )

    arms = {name: [scored(name, seed) for seed in range(seeds)] for name in names}
    folders = {
        name: [work / "runs" / f"{folder_name(name)}-{seed}" for seed in range(seeds)]
        for name in names
    }
    online_methods.plot(online_methods.curves(work, folders), picture)
    return [
        "",
        "## Methods that learn from a judge",
        "",
        f"![reward over training]({picture.name})",
        *online_methods.over_optimisation(scored("", 0), arms),
        *online_methods.READING,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs/methods-benchmark"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "methods.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    work = options.work
    make_data(work)
    base = base_results(work)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    with tqdm(total=len(options.methods) * options.seeds, unit="run") as bar:
        for name in options.methods:
            for seed in range(options.seeds):
                bar.set_description(f"{name}, seed {seed}")
                results[name].append(measure(name, seed, work))
                bar.update()
    if set(options.methods) != set(ARMS):
        print("a part of the methods: no report written")
        return
    judged_arms = [name for name in ARMS if ARMS[name].kind == "online"]
    facts = (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, torch "
        f"{torch.__version__.split('+')[0]} with {torch.get_num_threads()} threads"
    )
    assert __doc__ is not None
    body = [
        "# The methods on the shapes world",
        "",
        *__doc__.split("\n\n", 1)[1].rstrip().split("\n"),
        "",
        f"Measured on {facts}.",
        "",
        *table(base, results),
        *comparisons(results),
        *verdicts(base, results),
        *reading(base, results),
        *online_report(
            work, judged_arms, options.seeds, options.output.with_name("methods_online.png")
        ),
    ]
    options.output.write_text("\n".join(body) + "\n")
    print("\n".join(body))


if __name__ == "__main__":
    main()
