"""Write docs/demo.png: ``python -m tools.demo_picture [--seed 3]``.

A headless browser opens six of the demo's tabs, as in `tests/demo/test_browser.py`. The
run of the tab *Train* is made for it: 60 steps on 12 prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "demo"))
TABS = ("compare", "vote", "steer", "scores", "gallery", "train")
COLUMNS = 3
WIDTH, HEIGHT = 640, 600


def train(folder: Path) -> None:
    """Train for a moment, with a validation."""
    from diffalign.cli.entry import run

    build = ["data", "build", "--prompts", "shapes", "--max_prompts", "12"]
    build += ["--scorers", "shapes", "--output_dir", str(folder / "built"), "--quiet"]
    command = ["train", "--config", str(ROOT / "configs/diffusion_dpo/shapes.yaml"), "--quiet"]
    settings = {
        "data.dataset_name": folder / "built" / "pairs",
        "data.cache_latents": folder / "cache",
        "data.cache_text_embeddings": folder / "cache",
        "train.output_dir": folder / "runs" / "first",
        "train.max_steps": 60,
        "train.warmup_steps": 5,
        "train.logging_steps": 5,
        "validation.validation_steps": 30,
    }
    for arguments in (
        build,
        command + [str(x) for k, v in settings.items() for x in (f"--{k}", v)],
    ):
        if run(arguments):
            raise SystemExit(1)


def screenshots(seed: int, folder: Path) -> list[Image.Image]:
    """Use the tabs and photograph them."""
    import test_browser

    train(folder)
    server = test_browser.Server(folder, "--runs", "runs")
    visitor: Any = test_browser.Visitor(server.url)
    visitor.driver.set_window_size(1216, 1300)  # 16 pixels are the scroll bar
    try:
        for each in (seed + 2, seed + 1, seed):
            visitor.write("compare-seed", str(each))
            visitor.at("compare-go").click()
            shown = f"Seed {each},"
            visitor.until(lambda text=shown: text in visitor.at("compare-status").text)
        visitor.until(lambda: len(set(visitor.sources("compare-slider"))) == 2)
        _photograph(visitor, folder / "compare.png")
        visitor.show_pair("ann")
        _photograph(visitor, folder / "vote.png")
        visitor.tab("Steer")
        visitor.at("steer-go").click()
        visitor.until(lambda: "initial noises survive" in visitor.at("steer-status").text)
        visitor.until(lambda: len(set(visitor.sources("steer-slider"))) == 2)
        _photograph(visitor, folder / "steer.png")
        visitor.tab("Scores")
        drawn = sorted((folder / "diffalign-gallery").glob("comparison-*-[lr]*.png"))
        file = visitor.driver.find_element("css selector", "#scores-images input[type=file]")
        file.send_keys("\n".join(map(str, drawn[:4])))
        visitor.until(lambda: len(visitor.sources("scores-images")) == len(drawn[:4]))
        visitor.at("scores-go").click()
        visitor.until(lambda: drawn[0].name[:20] in visitor.at("scores-table").text)
        _photograph(visitor, folder / "scores.png")
        visitor.tab("Gallery")
        visitor.until(lambda: len(visitor.sources("gallery-images")) >= 3)
        _photograph(visitor, folder / "gallery.png")
        visitor.tab("Train")
        visitor.until(lambda: "finished" in visitor.at("train-status").text)
        visitor.until(lambda: visitor.sources("train-samples"))
        _photograph(visitor, folder / "train.png")
    finally:
        visitor.driver.quit()
        server.kill()
    return [Image.open(folder / f"{name}.png").convert("RGB") for name in TABS]


def _photograph(visitor: Any, file: Path) -> None:
    visitor.driver.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
    time.sleep(1)  # what fades in has done so
    visitor.driver.save_screenshot(str(file))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=3, help="of the compared images")
    options = parser.parse_args()
    rows = -(-len(TABS) // COLUMNS)
    picture = Image.new("RGB", (WIDTH * COLUMNS, HEIGHT * rows), "white")
    with tempfile.TemporaryDirectory() as folder:
        for i, shot in enumerate(screenshots(options.seed, Path(folder))):
            shot.thumbnail((WIDTH, 10 * HEIGHT))
            place = (i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT)
            picture.paste(shot.crop((0, 0, WIDTH, HEIGHT)), place)
    picture.save(ROOT / "docs" / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
