"""Write docs/demo.png: ``python -m tools.demo_picture [--seed 3]``.

A headless browser opens the demo's three tabs, as in `tests/demo/test_browser.py`.
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
TABS = ("compare", "vote", "steer")
WIDTH, HEIGHT = 640, 600


def screenshots(seed: int, folder: Path) -> list[Image.Image]:
    """Use the three tabs and photograph them."""
    import test_browser

    server = test_browser.Server(folder)
    visitor: Any = test_browser.Visitor(server.url)
    visitor.driver.set_window_size(1216, 1300)  # 16 pixels are the scroll bar
    try:
        visitor.write("compare-seed", str(seed))
        visitor.at("compare-go").click()
        visitor.until(lambda: len(set(visitor.sources("compare-slider"))) == 2)
        _photograph(visitor, folder / "compare.png")
        visitor.show_pair("ann")
        _photograph(visitor, folder / "vote.png")
        visitor.tab("Steer")
        visitor.at("steer-go").click()
        visitor.until(lambda: "initial noises survive" in visitor.at("steer-status").text)
        visitor.until(lambda: len(set(visitor.sources("steer-slider"))) == 2)
        _photograph(visitor, folder / "steer.png")
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
    picture = Image.new("RGB", (WIDTH * len(TABS), HEIGHT), "white")
    with tempfile.TemporaryDirectory() as folder:
        for i, shot in enumerate(screenshots(options.seed, Path(folder))):
            shot.thumbnail((WIDTH, 10 * HEIGHT))
            picture.paste(shot.crop((0, 0, WIDTH, HEIGHT)), (i * WIDTH, 0))
    picture.save(ROOT / "docs" / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
