"""Embedders of users: CLIP differences, a vision-language model, a server, own ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.errors import ConfigError, UserError
from diffalign.rewards import users as module
from diffalign.rewards.users import (
    ExamplePair,
    HiddenStates,
    conversation,
    embed_users,
    load_user_embedder,
    register_user_embedder,
)


def pairs(first: str = "red", second: str = "blue") -> list[ExamplePair]:
    one, other = (Image.new("RGB", (64, 64), color) for color in (first, second))
    return [ExamplePair("a small red circle on the left of a gray background", one, other)]


def test_clip_differences_are_of_length_one_and_opposite() -> None:
    embedder = load_user_embedder("clip_difference:shapes-clip")
    values = embed_users(embedder, [pairs(), pairs("blue", "red")])
    assert values.shape[:2] == (2, 2)
    torch.testing.assert_close(values.norm(dim=2), torch.ones(2, 2))
    torch.testing.assert_close(values[0, 0], -values[1, 0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="jpeg_compressibility has no embeddings"):
        load_user_embedder("clip_difference:jpeg_compressibility")


class Answers(BaseHTTPRequestHandler):
    requests: list[tuple[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, body))
        reply: dict[str, Any] = {"choices": [{"message": {"content": "likes red"}}]}
        if self.path.endswith("embeddings"):
            reply = {"data": [{"embedding": [0.5, float(len(body["input"]))]}]}
        if body["model"] == "odd":
            reply = {"choices": []}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    Answers.requests = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", Answers.requests
    running.shutdown()


def test_a_server_describes_and_embeds(server: tuple[str, list[Any]]) -> None:
    url, requests = server
    embedder = load_user_embedder(f"server:{url}#vlm,text")
    assert embed_users(embedder, [pairs()]).tolist() == [[[0.5, 9.0]]]
    (path, chat), (other, embedding) = requests
    assert (path, other) == ("/v1/chat/completions", "/v1/embeddings")
    assert (chat["model"], chat["temperature"], embedding["model"]) == ("vlm", 0, "text")
    kinds = [part["type"] for part in chat["messages"][0]["content"]]
    assert kinds == ["text", "text", "image_url", "text", "image_url"]
    with pytest.raises(UserError, match="gave no answer about a user"):
        embed_users(load_user_embedder(f"server:{url}#odd"), [pairs()])
    with pytest.raises(ConfigError, match="expected server:URL#MODEL"):
        load_user_embedder(f"server:{url}")


def test_a_server_that_is_absent_is_a_sentence() -> None:
    embedder = load_user_embedder("server:http://127.0.0.1:9#vlm")
    with pytest.raises(UserError, match="user_embeddings: http://127.0.0.1:9/v1/chat"):
        embed_users(embedder, [pairs()])


def test_hidden_states_of_a_model_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the interface of a model and its processor."""

    class Tokens(dict):  # type: ignore[type-arg]
        def to(self, device: Any) -> Tokens:
            return self

    class Processor:
        @staticmethod
        def apply_chat_template(messages: Any, add_generation_prompt: bool) -> str:
            return "question" + (" answer:" if add_generation_prompt else "")

        def __call__(self, images: Any, text: str, return_tensors: str) -> Tokens:
            assert len(images) == 2 and images[0].size == (16, 16)
            return Tokens(input_ids=torch.arange(6)[None])

        @staticmethod
        def tokenizer(text: str, add_special_tokens: bool) -> Any:
            assert text == " answer:" and not add_special_tokens
            return type("Encoded", (), {"input_ids": [1, 2]})

    class Network:
        device = "cpu"

        def __call__(self, input_ids: torch.Tensor, output_hidden_states: bool) -> Any:
            states = torch.arange(6.0)[None, :, None].expand(1, 6, 3)
            return type("Output", (), {"hidden_states": [torch.zeros(1, 6, 3), states]})

    embedder = object.__new__(HiddenStates)
    embedder.name, embedder.image_size = "transformers:tiny", 16
    embedder.processor, embedder.network = Processor(), Network()
    assert embed_users(embedder, [pairs()]).tolist() == [[[4.5, 4.5, 4.5]]]


def test_a_model_that_is_absent_is_a_sentence(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="user_embeddings: .* cannot be loaded"):
        load_user_embedder(f"transformers:{tmp_path}")


def test_own_embedders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_registered", {})

    @register_user_embedder("mine")
    class Mine:
        name = "mine"

        def __call__(self, users: Any) -> torch.Tensor:
            return torch.full((len(users), 2), 1.0)

    with pytest.raises(UserError, match=r"mine gave shape \(1, 2\) for 1 users"):
        embed_users(load_user_embedder("mine"), [pairs()])
    with pytest.raises(ConfigError, match="'server:x' is built in"):
        register_user_embedder("server:x")
    with pytest.raises(ConfigError, match=r"no embedder 'mime' \(did you mean 'mine'"):
        load_user_embedder("mime")


def test_a_conversation_names_prompts_and_order() -> None:
    parts = conversation(pairs() * 2, lambda image: {"type": "image"})[0]["content"]
    text = " ".join(part.get("text", "<image>") for part in parts)
    assert text.count("<image>") == 4 and "Pair 2, prompt: a small red circle" in text
    assert text.index("preferred:") < text.index("<image>") < text.index("not preferred:")
