"""The demo in a real headless browser; and its routes, used as nobody should."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from diffalign import load_preferences

if not find_spec("gradio"):  # importing it takes seconds
    pytest.skip("no gradio on this machine", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = (
    shutil.which("chromium") or shutil.which("chromium-browser"),
    shutil.which("chromedriver"),
)
ARTIFACTS = Path(
    os.environ.get("DIFFALIGN_TEST_ARTIFACTS", Path(__file__).parents[2] / ".artifacts" / "demo")
)
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine"
)
pytestmark = pytest.mark.filterwarnings("ignore")
PATIENT = {"timeout": 60}  # the client's own 5 seconds are few while others draw


class Server:
    """``diffalign demo`` as a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.arguments, self.url = folder, arguments, f"http://127.0.0.1:{self.port}"
        self.votes = folder / "votes" / "votes.jsonl"
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "diffalign",
            "demo",
            "--port",
            str(self.port),
            "--votes_dir",
            "votes",
            *self.arguments,
        ]
        self.log = (self.folder / "log.txt").open("a")
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=self.log, stderr=subprocess.STDOUT
        )
        for _ in range(1800):
            try:
                urllib.request.urlopen(self.url, timeout=2).read()
                return
            except urllib.error.HTTPError:
                return  # it answers, with a login page
            except OSError:
                assert self.process.poll() is None, (self.folder / "log.txt").read_text()
                time.sleep(0.1)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()


class Visitor:
    """A browser with one person in front of it."""

    def __init__(self, url: str, width: int = 1200) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--window-size={width},1300",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(executable_path=DRIVER)
        )
        self.open(url)

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until(lambda: self.at("compare-go").is_displayed())

    def at(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def until(self, true: Any, seconds: float = 60) -> None:
        ignored = (Exception,)
        WebDriverWait(self.driver, seconds, ignored_exceptions=ignored).until(lambda _: true())

    def tab(self, text: str) -> None:
        """Open a tab, by the menu *More tabs* where the screen is too narrow for it."""
        tabs = self.shown("button[role=tab]")
        if text not in tabs:
            self.driver.find_element(By.CSS_SELECTOR, "button[aria-label='More tabs']").click()
            tabs = self.shown(".overflow-dropdown button")
        tabs[text].click()
        selected = "button[role=tab][aria-selected=true], .overflow-dropdown button.selected"
        script = f"return document.querySelector({selected!r}).textContent.trim()"
        self.until(lambda: self.driver.execute_script(script) == text)

    def shown(self, selector: str) -> dict[str, Any]:
        """Text -> element, read again if the page was drawn anew meanwhile."""
        elements: dict[str, Any] = {}

        def read() -> bool:
            found = self.driver.find_elements(By.CSS_SELECTOR, selector)
            elements.update({element.text: element for element in found})
            return True

        self.until(read)
        return elements

    def sources(self, name: str) -> list[str]:
        return [
            e.get_attribute("src")
            for e in self.driver.find_elements(By.CSS_SELECTOR, f"#{name} img")
        ]

    def value(self, name: str) -> str:
        return self.driver.find_element(
            By.CSS_SELECTOR, f"#{name} textarea, #{name} input"
        ).get_attribute("value")

    def write(self, name: str, text: str) -> None:
        box = self.driver.find_element(By.CSS_SELECTOR, f"#{name} textarea, #{name} input")
        box.clear()
        box.send_keys(text)

    def press(self, key: str) -> None:
        self.driver.execute_script("document.activeElement.blur()")
        webdriver.ActionChains(self.driver).send_keys(key).perform()

    def picture(self, name: str) -> None:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        time.sleep(0.5)  # what fades in has done so
        self.driver.save_screenshot(str(ARTIFACTS / f"{name}.png"))

    def show_pair(self, annotator: str) -> None:
        self.tab("Blind vote")
        self.write("vote-annotator", annotator)
        self.at("vote-start").click()
        self.until(lambda: self.at("vote-left").is_enabled() and self.sources("vote-image-left"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("demo"))
    yield running
    running.kill()


@pytest.fixture(scope="module")
def visitor(server: Server) -> Iterator[Visitor]:
    someone = Visitor(server.url)
    yield someone
    someone.driver.quit()


def lines(server: Server) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in server.votes.read_text().splitlines()]
        if server.votes.is_file()
        else []
    )


@needs_browser
def test_compare(visitor: Visitor) -> None:
    visitor.tab("Compare")
    visitor.at("compare-go").click()
    visitor.until(lambda: "same initial noise on both sides" in visitor.at("compare-status").text)
    visitor.until(lambda: len(set(visitor.sources("compare-slider"))) == 2)
    assert "shapes-clip" in visitor.at("compare-scores").text
    visitor.picture("compare")
    before = visitor.sources("compare-slider")
    visitor.at("compare-next").click()
    visitor.until(lambda: "Seed 1," in visitor.at("compare-status").text)
    visitor.until(lambda: set(visitor.sources("compare-slider")).isdisjoint(before))


@pytest.mark.nightly
@needs_browser
def test_compare_by_keyboard_alone(visitor: Visitor) -> None:
    visitor.tab("Compare")
    visitor.write("compare-seed", "7")
    visitor.write(
        "compare-prompt", "a small blue circle on the left of a white background\n"
    )  # return draws
    visitor.until(lambda: "Seed 7," in visitor.at("compare-status").text)


@pytest.mark.nightly
@needs_browser
def test_steer(visitor: Visitor) -> None:
    visitor.tab("Steer")
    visitor.at("steer-go").click()
    visitor.until(lambda: visitor.sources("steer-trace"))  # while it runs
    visitor.until(lambda: "initial noises survive" in visitor.at("steer-status").text)
    visitor.until(lambda: len(set(visitor.sources("steer-slider"))) == 2)
    assert "best particle" in visitor.at("steer-scores").text
    visitor.picture("steer")


@pytest.mark.nightly
@needs_browser
def test_votes_by_key_and_click_survive_the_servers_death(server: Server, visitor: Visitor) -> None:
    visitor.show_pair("ann")
    visitor.picture("vote")
    before = len(lines(server))
    first = visitor.value("vote-pair")
    assert not {"base", "diffusion-dpo"} & set(visitor.at("vote-prompt").text.split())
    visitor.press("2")
    visitor.until(lambda: len(lines(server)) == before + 1)
    last = lines(server)[-1]
    assert (last["vote"], last["annotator"], last["id"]) == ("right", "ann", first)
    visitor.until(
        lambda: (
            visitor.value("vote-pair") not in ("", first) and visitor.at("vote-tie").is_enabled()
        )
    )
    visitor.at("vote-tie").click()
    visitor.until(lambda: len(lines(server)) == before + 2)
    server.kill()  # at once, while the next pair is being drawn
    assert [line["vote"] for line in lines(server)[-2:]] == ["right", "tie"]
    server.start()
    visitor.open(server.url)
    visitor.tab("Blind vote")
    visitor.until(lambda: f"{before + 2} votes" in visitor.at("vote-status").text)
    visitor.at("vote-export").click()
    visitor.until(lambda: visitor.at("vote-download").is_displayed())
    link = visitor.driver.execute_script(
        "const e = document.getElementById('vote-download'); return (e.closest('a') || "
        "e.querySelector('a') || e).href"
    )
    if link:
        path = server.folder / "down.parquet"
        path.write_bytes(urllib.request.urlopen(link).read())
        assert len(load_preferences(str(path), verbose=False, httpx_kwargs=PATIENT)) == sum(
            line["vote"] != "tie" for line in lines(server)
        )


@needs_browser
def test_thumbs_by_key_and_click(server: Server, visitor: Visitor) -> None:
    file = server.folder / "votes" / "likes.jsonl"

    def thumbs() -> list[dict[str, Any]]:
        return (
            [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        )

    visitor.open(server.url)
    visitor.tab("Thumbs")
    visitor.write("like-annotator", "ann")
    visitor.at("like-start").click()
    visitor.until(lambda: visitor.at("like-up").is_enabled() and visitor.sources("like-image"))
    visitor.picture("like")
    first = visitor.value("like-shown")
    visitor.press("+")
    visitor.until(lambda: len(thumbs()) == 1)
    assert (thumbs()[0]["label"], thumbs()[0]["id"], thumbs()[0]["annotator"]) == (
        True, first, "ann",
    )  # fmt: skip
    visitor.until(
        lambda: (
            visitor.value("like-shown") not in ("", first) and visitor.at("like-down").is_enabled()
        )
    )
    visitor.at("like-down").click()
    visitor.until(lambda: [line["label"] for line in thumbs()] == [True, False])
    visitor.until(lambda: "2 thumbs" in visitor.at("like-status").text)
    visitor.at("like-export").click()
    visitor.until(lambda: visitor.at("like-download").is_displayed())


@needs_browser
def test_a_link_and_the_gallery_restore_a_comparison(server: Server, visitor: Visitor) -> None:
    visitor.open(server.url)
    for seed, scale in (("21", "0.5"), ("22", "1")):
        visitor.write("compare-seed", seed)
        visitor.write("compare-scale", scale)
        visitor.at("compare-go").click()
        visitor.until(lambda seed=seed: f"Seed {seed}," in visitor.at("compare-status").text)
    link = visitor.at("compare-status").find_element(By.TAG_NAME, "a").get_attribute("href")
    scores = visitor.at("compare-scores").text
    visitor.tab("Gallery")
    visitor.until(lambda: len(visitor.sources("gallery-images")) >= 2)
    visitor.picture("gallery")
    items = visitor.driver.find_elements(By.CSS_SELECTOR, "#gallery-images button")
    next(item for item in items if "seed 21" in item.text).click()
    visitor.until(lambda: visitor.at("compare-go").is_displayed())
    visitor.until(lambda: "Seed 21," in visitor.at("compare-status").text)
    assert visitor.value("compare-seed") == "21" and visitor.value("compare-scale") == "0.5"
    visitor.until(lambda: len(set(visitor.sources("compare-slider"))) == 2)
    server.kill()
    server.start()  # a link outlives the server
    visitor.open(link)
    visitor.until(lambda: "Seed 22," in visitor.at("compare-status").text)
    assert visitor.value("compare-seed") == "22" and visitor.value("compare-scale") == "1"
    assert visitor.at("compare-scores").text == scores
    visitor.open(f"{server.url}/?comparison=0123456789abcdef")
    visitor.until(lambda: "no longer in the gallery" in visitor.at("compare-status").text)


@needs_browser
def test_dropped_images_are_scored(visitor: Visitor, server: Server, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("red|1.png", "blue.png"):
        Image.new("RGB", (64, 64), name.partition(".")[0].partition("|")[0]).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    visitor.open(server.url)
    visitor.tab("Scores")
    file = visitor.driver.find_element(By.CSS_SELECTOR, "#scores-images input[type=file]")
    file.send_keys("\n".join(str(tmp_path / name) for name in ("red|1.png", "blue.png")))
    visitor.until(lambda: len(visitor.sources("scores-images")) == 2)
    visitor.write("scores-prompt", PROMPT)
    visitor.at("scores-go").click()
    visitor.until(lambda: "blue.png" in visitor.at("scores-table").text)
    rows = visitor.at("scores-table").text.splitlines()
    assert rows[0].split() == ["image", "shapes", "shapes-clip"] and len(rows) == 3
    visitor.picture("scores")


@needs_browser
def test_a_run_is_watched_while_it_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    (run / "logs").mkdir(parents=True)
    (run / "config.yaml").write_text("method: mapo\nmodel: shapes\ntrain: {max_steps: 40}\n")
    metrics = run / "logs" / "metrics.jsonl"
    entries = [json.dumps({"step": s, "train/loss": 1 / s, "reward": s}) for s in range(1, 11)]
    metrics.write_text("\n".join(entries) + "\n")
    server = Server(tmp_path, "--runs", "runs", "--scorers", "shapes")
    one = Visitor(server.url)
    try:
        one.tab("Train")
        one.until(lambda: "step 10 of 40" in one.at("train-status").text)
        one.until(lambda: len(one.driver.find_elements(By.CSS_SELECTOR, "#train-plot-0 svg")) > 0)
        from PIL import Image

        (run / "samples").mkdir()
        Image.new("RGB", (64, 64), "red").save(run / "samples" / "step-20.png")
        with metrics.open("a") as file:
            file.write(json.dumps({"step": 20, "train/loss": 0.1}) + "\n")
        one.until(lambda: "step 20 of 40" in one.at("train-status").text)
        one.until(lambda: one.sources("train-samples"))
        one.picture("train")
        (run / "pytorch_lora_weights.safetensors").touch()
        one.until(lambda: "finished at step 20" in one.at("train-status").text)
    finally:
        one.driver.quit()
        server.kill()


@pytest.mark.nightly
@needs_browser
def test_two_visitors_at_once_do_not_mix(server: Server, visitor: Visitor) -> None:
    other = Visitor(server.url)
    try:
        visitor.open(server.url)
        people = {"ann": visitor, "bob": other}
        for name, one in people.items():
            one.show_pair(name)
        pairs = {name: one.value("vote-pair") for name, one in people.items()}
        prompts = {name: one.value("vote-prompt") for name, one in people.items()}
        assert pairs["ann"] != pairs["bob"]
        before = len(lines(server))
        visitor.press("1")
        other.press("0")
        visitor.until(lambda: len(lines(server)) == before + 2)
        said = {line["annotator"]: line for line in lines(server)[before:]}
        assert {name: line["id"] for name, line in said.items()} == pairs
        assert {name: line["prompt"] for name, line in said.items()} == prompts
        assert (said["ann"]["vote"], said["bob"]["vote"]) == ("left", "tie")
    finally:
        other.driver.quit()


@pytest.mark.nightly
@needs_browser
def test_four_votes_draw_for_a_taste(tmp_path: Path) -> None:
    import torch

    from diffalign.backbones.lora import denoiser
    from diffalign.backbones.user_adapter import UserAdapter
    from diffalign.generation.pipelines import base_pipeline

    made = UserAdapter(denoiser(base_pipeline()), dim=8, tokens=2, user_names=["ann", "bob"])
    for layer in made.layers:
        torch.nn.init.normal_(layer.to_v.weight, std=0.3)
    (tmp_path / "users").mkdir()
    made.save(tmp_path / "users", {"beta": 500.0})
    server = Server(tmp_path, "--user_adapter", "users")
    one = Visitor(server.url)
    try:
        one.show_pair("ann")
        for count in range(4):
            shown = one.value("vote-pair")
            one.press("1")
            one.until(lambda n=count + 1: len(lines(server)) == n)
            one.until(
                lambda old=shown: (
                    one.value("vote-pair") not in ("", old) and one.at("vote-left").is_enabled()
                )
            )
        one.at("vote-personal").click()
        one.until(lambda: "most like one of" in one.at("vote-personal-like").text)
        one.until(lambda: one.sources("vote-personal-plain") and one.sources("vote-personal-own"))
        one.driver.execute_script("window.scrollTo(0, document.body.scrollHeight)")
        one.picture("personal")
    finally:
        one.driver.quit()
        server.kill()


@pytest.mark.nightly
@needs_browser
def test_a_narrow_screen(server: Server) -> None:
    one = Visitor(server.url, width=500)
    try:
        one.driver.set_window_size(400, 900)
        for name in ("Compare", "Blind vote", "Thumbs", "Steer", "Scores", "Gallery"):
            one.tab(name)
            width, window = one.driver.execute_script(
                "return [document.documentElement.scrollWidth, window.innerWidth]"
            )
            assert width <= window
            one.picture(f"narrow-{name.split()[0].lower()}")
    finally:
        one.driver.quit()


@pytest.mark.nightly
@needs_browser
def test_html_in_texts_does_nothing(server: Server, visitor: Visitor) -> None:
    visitor.open(server.url)
    evil = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"
    visitor.tab("Compare")
    visitor.write("compare-prompt", evil + "\n")
    visitor.until(lambda: "same initial noise on both sides" in visitor.at("compare-status").text)
    visitor.tab("Steer")
    visitor.write("steer-prompt", evil + "\n")
    visitor.driver.execute_script("document.activeElement.blur()")
    visitor.show_pair(evil)
    visitor.press("1")
    visitor.until(lambda: lines(server)[-1]["annotator"].startswith("img srcx"))
    assert visitor.driver.title == "diffalign demo"
    assert not [entry for entry in visitor.driver.get_log("browser") if "evil" in entry["message"]]


# Without a browser: the routes


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    from gradio_client import Client

    return Client(server.url, verbose=False, httpx_kwargs=PATIENT)


PROMPT = "a small red circle on the left of a gray background"
CALL: dict[str, Any] = {
    "prompt": PROMPT,
    "seed": 0,
    "steps": 3,
    "guidance": 2,
    "side": 64,
    "left": "base",
    "right": "diffusion-dpo",
    "scale": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 10**9},
        {"steps": -1},
        {"seed": -5},
        {"seed": 10**30},
        {"guidance": 1e300},
        {"scale": 50},
        {"side": 10**7},
        {"prompt": "x" * 100_000},
        {"prompt": ""},
        {"left": "../../../etc/passwd"},
        {"right": "/etc/passwd"},
    ],
)
def test_hostile_numbers_and_names_are_refused(client: Any, changes: dict[str, Any]) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises((AppError, ValueError)) as error:
        client.predict(*{**CALL, **changes}.values(), api_name="/compare")
    assert "Traceback" not in str(error.value)


def test_the_page_still_works_after_all_that(client: Any) -> None:
    images, table, status = client.predict(*CALL.values(), api_name="/compare")
    assert len(images) == 2 and "shapes" in table and "Seed 0" in status


def test_base_and_lora_at_scale_0_are_the_same_picture(client: Any) -> None:
    images, _, _ = client.predict(*{**CALL, "scale": 0}.values(), api_name="/compare")
    first, second = (
        Path(image["path"] if isinstance(image, dict) else image).read_bytes() for image in images
    )
    assert first == second


def test_a_vote_for_a_pair_that_was_never_shown_is_none(client: Any, server: Server) -> None:
    before = len(lines(server))
    client.predict("made-up", "eve", api_name="/vote_left")
    assert len(lines(server)) == before


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../../../etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=VOTES",
        "/file=/etc/passwd",
        "/assets/../../../../../../etc/passwd",
        "/static/../../../../../../etc/passwd",
        "/theme.css/../../../etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/x",
    ],
)
def test_no_file_of_the_server_is_reachable(server: Server, path: str) -> None:
    import http.client

    server.votes.parent.mkdir(exist_ok=True)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path.replace("VOTES", str(server.votes)))
    answer = connection.getresponse()
    body = answer.read()
    assert b"root:" not in body and b"annotator" not in body[:200]
    assert answer.status >= 400 or b"<html" in body.lower()


def upload(server: Server, name: str, content: bytes) -> str:
    """Send a file as the page does, and return its path on the server."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + b"\r\n--x--\r\n"
    sent = urllib.request.Request(
        f"{server.url}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    return str(json.loads(urllib.request.urlopen(sent).read())[0])


def picture_of(size: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(buffer, "PNG")
    return buffer.getvalue()


def ask_for_scores(server: Server, files: list[dict[str, Any]]) -> str:
    """Call the route as a program would, and return everything that it says."""
    images = [{"image": {"meta": {"_type": "gradio.FileData"}, **file}} for file in files]
    url = f"{server.url}/gradio_api/call/scores"
    body = json.dumps({"data": [images, PROMPT]}).encode()
    sent = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    id = json.loads(urllib.request.urlopen(sent).read())["event_id"]
    return str(urllib.request.urlopen(f"{url}/{id}", timeout=60).read(), "utf-8")


def test_uploaded_images_are_scored(server: Server) -> None:
    path = upload(server, "a.png", picture_of(64))
    answer = ask_for_scores(server, [{"path": path}])
    assert "event: complete" in answer and "shapes-clip" in answer


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ({"path": "/etc/passwd"}, ""),
        ({"path": "http://127.0.0.1:1/a.png"}, ""),
        ({"path": "https://example.com/a.png"}, "upload files, not links"),
        ({"path": "ftp://example.com/a.png"}, ""),
        ({"path": "", "url": "https://example.com/a.png"}, ""),
    ],
)
def test_no_file_or_address_can_be_named(server: Server, file: dict[str, Any], says: str) -> None:
    answer = ask_for_scores(server, [file])
    assert "event: error" in answer and "root:" not in answer and says in answer


def test_damaged_and_too_many_images_are_refused(server: Server) -> None:
    broken = upload(server, "b.png", b"no image")
    answer = ask_for_scores(server, [{"path": broken}])
    assert "images: 1 (b.png) cannot be used" in answer
    path = upload(server, "a.png", picture_of(64))
    assert "17 are too many; at most 16" in ask_for_scores(server, [{"path": path}] * 17)
    assert "drop at least one" in ask_for_scores(server, [])


def test_an_upload_that_is_too_large_is_refused(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        upload(server, "a.png", b"0" * (17 << 20))
    assert error.value.code == 413


@pytest.mark.nightly
def test_uploads_are_refused_in_public(tmp_path: Path) -> None:
    server = Server(tmp_path, "--host", "0.0.0.0", "--scorers", "shapes")
    try:
        with pytest.raises(urllib.error.HTTPError) as error:
            upload(server, "a.png", b"0" * 5000)
        assert error.value.code == 413
    finally:
        server.kill()


def test_requests_of_other_routes_stay_small(server: Server) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", "/gradio_api/call/scores")
    connection.putheader("Content-Length", str(5 << 20))
    connection.endheaders()  # refused by its length, before the body is sent
    assert connection.getresponse().status == 413


@pytest.mark.nightly
def test_no_vote_of_twenty_visitors_is_lost(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from gradio_client import Client

    server = Server(tmp_path, "--scorers", "shapes")

    def vote(number: int) -> list[str]:
        client = Client(server.url, verbose=False, httpx_kwargs={"timeout": 300})
        ids = []
        for turn in range(3):
            shown = client.predict(f"visitor {number}", api_name="/pair")
            ids.append(next(part for part in shown if isinstance(part, str) and len(part) == 32))
            choice = ("left", "right", "tie")[(number + turn) % 3]
            client.predict(ids[-1], f"visitor {number}", api_name=f"/vote_{choice}")
        return ids

    try:
        with ThreadPoolExecutor(20) as pool:
            shown = [id for ids in pool.map(vote, range(20)) for id in ids]
    finally:
        server.kill()
    votes = lines(server)
    assert len(set(shown)) == 60 and {line["id"] for line in votes} == set(shown)
    assert len(votes) == 60
    by_person = [sum(v["annotator"] == f"visitor {n}" for v in votes) for n in range(20)]
    assert by_person == [3] * 20


@pytest.mark.nightly
def test_many_at_once_are_all_answered(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from gradio_client import Client

    def ask(seed: int) -> str:
        return Client(server.url, verbose=False, httpx_kwargs=PATIENT).predict(
            *{**CALL, "seed": seed}.values(), api_name="/compare"
        )[2]

    with ThreadPoolExecutor(6) as pool:
        assert [
            f"Seed {seed}," in status for seed, status in enumerate(pool.map(ask, range(6)))
        ] == [True] * 6


@pytest.mark.nightly
def test_a_login_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("ann:secret\n")
    running = Server(tmp_path, "--auth_file", "auth", "--scorers", "shapes")
    try:
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{running.url}/config")
        assert error.value.code == 401
        from gradio_client import Client

        assert Client(
            running.url, auth=("ann", "secret"), verbose=False, httpx_kwargs=PATIENT
        ).predict(*CALL.values(), api_name="/compare")[2]
    finally:
        running.kill()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "-1"], "--port: expected int >= 0, got -1"),
        (["--tuned", "nowhere/at/all"], "tuned: "),
        (["--base", "nowhere/at/all", "--tuned", "shapes"], "base: "),
        (["--scorers", "shape"], "shapes"),
        (["--auth_file", "none"], "--auth_file: there is no file 'none'"),
        (["--prompts", "none"], "--prompts: 'none' is neither a file"),
        (["--max_particles", "1"], "--max_particles: expected int >= 2"),
    ],
)
def test_mistakes_before_it_starts(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffalign.cli.entry import run

    monkeypatch.chdir(tmp_path)
    assert run(["demo", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
