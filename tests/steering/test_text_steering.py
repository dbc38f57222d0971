"""Text models and `FKTextSteering`: frozen tokens, clamped prompts, streams, mistakes,
and the embedded denoiser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiscreteDDIMScheduler
from torch import Tensor

from diffalign.errors import ConfigError, UserError
from diffalign.shapes import parse_prompt, text_weights_dir
from diffalign.shapes.text_denoiser import load_text_denoiser
from diffalign.steering.smc import run
from diffalign.steering.text import FKTextSteering, MaskedDiffusion, TextReward, UniformDiffusion
from diffalign.steering.tokens import TokenState, categorical
from tools.shapes import pretrain_text

V, L, MASK = 5, 6, 5


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(tokens: Tensor) -> Tensor:
    """A network whose prediction depends on what is revealed."""
    position = torch.arange(L)[:, None] * torch.arange(V + 1)
    return torch.cos(position + tokens.sum(-1)[:, None, None].double())


def model(**options) -> MaskedDiffusion:
    return MaskedDiffusion(logits, **{"mask_token_id": MASK, "length": L, "num_steps": 4} | options)


def total(tokens: Tensor) -> Tensor:
    return tokens.double().sum(-1)


def test_revealed_tokens_are_frozen_and_the_last_step_reveals_all() -> None:
    sampler = model()
    state = sampler.init(3, 4, gen(0))
    assert (state.tokens == MASK).all()
    for i in range(4):
        state = sampler.prepare(state, i)
        before = state.tokens
        state = sampler.propose(state, i, gen(i))
        kept = before != MASK
        assert torch.equal(state.tokens[kept], before[kept])
    assert (state.tokens != MASK).all() and (state.tokens >= 0).all() and (state.tokens < V).all()


def test_one_network_call_per_step_whatever_is_drawn() -> None:
    sampler = model(num_x0_samples=16, batch_size=5)
    run(
        sampler,
        total,
        groups=2,
        num_particles=3,
        lmbda=1.0,
        resample_steps=(0, 1, 2, 3),
        generator=gen(0),
    )
    assert sampler.network_rows == 6 * 4


def test_chunks_of_the_network_change_nothing() -> None:
    results = [
        run(model(batch_size=size), total, groups=2, num_particles=3, lmbda=0.3, generator=gen(0))
        for size in (None, 1, 4)
    ]
    assert all(torch.equal(results[0].particles, other.particles) for other in results[1:])


def test_predictions_are_permuted_with_their_particles() -> None:
    sampler = model()
    state = sampler.prepare(TokenState(torch.randint(0, MASK + 1, (1, 3, L), generator=gen(1))), 0)
    moved = sampler.index(state, torch.tensor([[2, 2, 0]]))
    again = sampler.prepare(TokenState(moved.tokens), 0).prediction
    torch.testing.assert_close(moved.prediction, again, rtol=0, atol=1e-12)


def test_templates_are_clamped() -> None:
    template = torch.full((2, L), MASK)
    template[0, :2], template[1, 4] = torch.tensor([3, 1]), 2
    result = run(
        model(template=template, num_x0_samples=3),
        total,
        groups=2,
        num_particles=4,
        lmbda=1.0,
        generator=gen(0),
    )
    assert (result.particles[0, :, :2] == torch.tensor([3, 1])).all() and (
        result.particles[1, :, 4] == 2
    ).all()
    drawn = model(template=template, num_x0_samples=3)
    state = drawn.prepare(drawn.init(2, 4, gen(0)), 0)
    clean = drawn.predict_x0(state, 0)
    assert clean.shape == (2, 4, 3, L) and (clean[0, ..., 0] == 3).all() and (clean != MASK).all()


def test_scoring_does_not_advance_the_noise() -> None:
    """More draws of clean texts, or none, and the same sampler noise: with lambda 0 the
    texts are the same."""
    texts = [
        run(
            model(num_x0_samples=n),
            total,
            groups=2,
            num_particles=3,
            lmbda=0.0,
            resample_steps=steps,
            generator=gen(4),
        ).particles
        for n, steps in ((1, ()), (1, (0, 1)), (7, (0, 1, 2)))
    ]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_streams_per_group() -> None:
    both = run(model(), total, groups=2, num_particles=3, lmbda=0.5, generator=[gen(1), gen(2)])
    turned = run(model(), total, groups=2, num_particles=3, lmbda=0.5, generator=[gen(2), gen(1)])
    assert torch.equal(both.particles, turned.particles.flip(0))
    torch.testing.assert_close(both.log_z, turned.log_z.flip(0), rtol=0, atol=1e-12)


def test_categorical_in_float64() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).double()
    noise = torch.tensor([0.0, 0.2499999999, 0.25, 0.9999999999999999], dtype=torch.float64)
    assert categorical(probabilities.expand(4, 5), noise).tolist() == [1, 1, 3, 3]


def test_temperature_sharpens() -> None:
    def agree(temperature: float) -> float:
        sampler = model(temperature=temperature)
        state = sampler.prepare(sampler.init(1, 1, gen(0)), 0)
        return float(state.prediction.exp().amax(-1).mean())

    assert agree(0.1) > agree(1.0) > agree(10.0)


def test_text_reward_scores_distinct_texts_once() -> None:
    seen = []

    def scorer(texts: list[str]) -> list[float]:
        seen.append(texts)
        return [float(len(text)) for text in texts]

    reward = TextReward(
        lambda rows: [" ".join("abc"[t] for t in row if t < 3) for row in rows], scorer
    )
    values = reward(torch.tensor([[[0, 1], [0, 1]], [[2, 3], [3, 3]]]))
    assert values.tolist() == [[3.0, 3.0], [1.0, 0.0]] and seen == [["a b", "c", ""]]
    assert (reward.calls, reward.scored) == (1, 3)
    with pytest.raises(UserError, match="scorer: expected 1 numbers for 1 texts, got 2"):
        TextReward(lambda rows: ["x"] * len(rows), lambda texts: [1.0, 2.0])(
            torch.zeros(2, 3, dtype=torch.int64)
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: model(temperature=0.0), "temperature: expected a number above 0"),
        (lambda: model(num_steps=0), "num_steps: expected int >= 1"),
        (lambda: model(num_x0_samples=0), "num_x0_samples: expected int >= 1"),
        (lambda: model(batch_size=-1), "batch_size: expected int >= 1"),
        (lambda: model(template=torch.zeros(3)), "template: expected 6 tokens, got 3"),
        (lambda: model(template=torch.zeros(3, L)).init(2, 2, None),
         r"template: expected one, or one per group \(2\)"),
        (lambda: UniformDiffusion(logits, DDIMScheduler(), vocab_size=3, length=2, num_steps=2),
         "expected a DiscreteDDIMScheduler"),
        (lambda: UniformDiffusion(
            logits, DiscreteDDIMScheduler(), vocab_size=1, length=2, num_steps=2),
         "vocab_size: expected int >= 2"),
        (lambda: MaskedDiffusion(lambda t: t, mask_token_id=1, length=2, num_steps=1).prepare(
            TokenState(torch.ones(1, 1, 2)), 0),
         "denoiser: expected logits"),
        (lambda: FKTextSteering(logits, None, len, lmbda=1.0),
         "give denoiser and tokenizer, or None for both"),
        (lambda: FKTextSteering(None, None, 3, lmbda=1.0),
         "scorer: expected a function of a list of texts"),
        (lambda: FKTextSteering(None, None, len, lmbda=-1.0),
         "lmbda: expected a finite number >= 0"),
        (lambda: FKTextSteering(None, None, len, lmbda=1.0, num_particles=1, resample_steps=(1,)),
         "1 particle cannot be resampled"),
        (lambda: FKTextSteering(None, None, len, lmbda=1.0)(["a " * 40]),
         "prompts: .* tokens, the whole text only 16"),
        (lambda: FKTextSteering(None, None, len, lmbda=1.0)([]), "prompts: expected at least one"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(make, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


# The embedded denoiser


def black_star(texts: list[str]) -> list[float]:
    """How much of 'a star on black' a text says."""
    return [float(("star" in text.split()) + ("black" in text.split())) for text in texts]


def captions(texts: list[str]) -> float:
    return sum(pretrain_text.is_caption(text) for text in texts) / len(texts)


def test_the_embedded_denoiser_writes_captions() -> None:
    steering = FKTextSteering(
        None, None, black_star, num_particles=50, lmbda=0.0, num_steps=16, resample_steps=()
    )
    texts = [text for row in steering(["", ""]).texts for text in row]
    card = json.loads((text_weights_dir() / "accuracy.json").read_text())
    assert captions(texts) > card["by_steps"]["16"]["captions"] - 0.15
    assert len(set(texts)) > 60


def test_steering_the_embedded_denoiser() -> None:
    options = {"num_particles": 8, "num_steps": 16, "num_x0_samples": 4}
    plain = FKTextSteering(None, None, black_star, lmbda=0.0, **options)([""] * 12)
    steered = FKTextSteering(None, None, black_star, lmbda=3.0, **options)([""] * 12)
    assert float(steered.rewards.mean()) > float(plain.rewards.mean()) + 0.5
    texts = [text for row in steered.texts for text in row]
    assert captions(texts) > 0.75
    assert steered.best[0] in steered.texts[0] and steered.draw(gen(0))[0] in steered.texts[0]
    assert steered.log_weights.shape == (12, 8) and steered.log_z.shape == (12,)


def test_prompts_stay_as_they_are() -> None:
    denoiser, tokenizer = load_text_denoiser()
    denoiser = denoiser.double()  # in float32 the size of the batch may change a token
    result = FKTextSteering(denoiser, tokenizer, black_star, lmbda=2.0, num_steps=12)(
        ["a small red", "a large"], seed=[5, 6]
    )
    assert all(text.startswith("a small red ") for text in result.texts[0]) and all(
        text.startswith("a large ") for text in result.texts[1]
    )
    alone = FKTextSteering(denoiser, tokenizer, black_star, lmbda=2.0, num_steps=12)(
        "a large", seed=6
    )
    assert alone.texts[0] == result.texts[1]


def test_the_command_that_made_it(tmp_path: Path) -> None:
    pretrain_text.main([
        "--output_dir", str(tmp_path / "out"), "--steps", "30", "--batch_size", "16",
        "--eval_samples", "100", "--hidden_size", "16", "--layers", "1",
    ])  # fmt: skip
    model, tokenizer = load_text_denoiser(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer) + 1
    assert "captions of the world" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="--steps: expected int >= 1, got 0"):
        pretrain_text.main(["--output_dir", str(tmp_path / "other"), "--steps", "0"])
    assert not (tmp_path / "other").exists()


def test_the_training_loss_is_the_elbo() -> None:
    """The mean over masks of the weighted loss of a factorised model is its exact
    cross-entropy."""
    tokens = torch.tensor([[0, 1]])
    scores = torch.randn(1, 2, 4, generator=gen(0)).double()
    exact = -(scores[..., :3].float().log_softmax(-1)).gather(-1, tokens[..., None]).mean()
    rate = torch.full((40_000,), 0.3)
    masked = torch.rand(40_000, 2, generator=gen(1)) < 0.3
    found = pretrain_text.masked_loss(
        scores.expand(40_000, 2, 4), tokens.expand(40_000, 2), masked, rate
    )
    assert float(found) == pytest.approx(float(exact), rel=0.03)
    assert parse_prompt("a small red circle on the left of a gray background").shape == "circle"
