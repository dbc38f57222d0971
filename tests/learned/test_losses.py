"""Golden values of reward losses, PAL and calibration, and gradients against finite
differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.rewards.learned import calibration, losses, pal
from diffalign.rewards.learned.heads import PalHead


def t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor | float, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), t(expected), rtol=0, atol=2e-9
    )


def test_pickscore() -> None:
    scores = t([[20, 18.5], [21, 21.4], [19, 19], [22, 20]])
    labels, counts = t([1, 0.5, 0.5, 0]), t([1, 2, 4, 4])
    loss, rows = losses.pickscore_loss(scores, labels, counts)
    close(rows, [0.2014132780, 0.0198680718, 0, 2.1269280110])
    close(loss, 0.3715396583)
    close(rows.mean(), 0.5870523402)
    close(
        torch.sigmoid(scores[:, 0] - scores[:, 1]), [0.8175744762, 0.4013123399, 0.5, 0.8807970780]
    )
    expected = {0: 0.625, 0.1: 0.625, 0.2: 0.75, 0.5: 0.75, 0.7: 0.625, 0.9: 0.75}
    for threshold, accuracy in expected.items():
        close(calibration.accuracy_with_ties(scores, labels, threshold).mean(), accuracy)


def test_in_batch_negatives() -> None:
    texts, first, second = (
        t([[1, 0], [0.6, 0.8]]),
        t([[0.8, 0.6], [0, 1]]),
        t([[0.6, -0.8], [1, 0]]),
    )
    rows = losses.in_batch_loss(texts, (first, second), 5.0, t([1, 0.5]))
    close((rows * t([2, 1])).sum() / 3, 1.2210183911)


def test_lists() -> None:
    scores, ranks = t([1.2, 0.3, 0.5, -0.7]), torch.tensor([1, 2, 2, 3])
    rows = losses.ranked_list_loss(scores, ranks)
    close(rows, [0.3411538747, 0.4031860489, 0.1393867583, 0.3132616875, 0.2632824673])
    close(rows.mean(), 0.2920541674)
    second = losses.ranked_list_loss(t([0.1, 0.4]), torch.tensor([1, 2]))
    close(torch.cat([rows, second]).mean(), 0.3857710135)
    close((rows.mean() + second.mean()) / 2, 0.5732047059)
    close(losses.plackett_luce_loss(t([1.2, 0.5, 0.3, -0.7])), 1.7838098700)
    close(losses.plackett_luce_loss(t([1.2, 0.3, 0.5, -0.7])), 1.9338306498)
    close(losses.plackett_luce_loss(t([0.3, -0.2])), torch.nn.functional.softplus(t(-0.5)).item())


def test_thumbs_and_ratings() -> None:
    rows = losses.thumbs_loss(t([0.8, -0.3, 1.5]), t([1, 0, 0]), -0.2)
    close(rows, [0.4374879505, 0.4740769842, 1.5410084538])
    close(rows.mean(), 0.8175244628)
    shares = losses.rating_probabilities(t([0.4]), t([-1, 0, 1.5]))
    close(shares[0], [0.1978161114, 0.2034962284, 0.3489477657, 0.2497398944])


def test_noisy_labels() -> None:
    z = t([1.5, -0.4, 0])
    close(losses.smoothed_loss(z, 0.1), [0.3514132780, 0.8730152524, 0.6931471806])
    corrected = losses.forward_corrected_loss(z, 0.1)
    close(corrected, [0.2822838943, 0.8650039917, 0.6931471806])
    close(corrected.mean(), 0.6134783555)
    close(losses.forward_corrected_loss(z, 0.0), losses.preference_loss(z).tolist())
    close(losses.margin_loss(z, t([0.5, 0, 1])), [0.3132616875, 0.9130152524, 1.3132616875])
    close(losses.rao_kupper_loss(z, t([1, 1, 1]), 5.0), [0.7493624724, 2.1352455617, 1.7917594692])
    tie = losses.rao_kupper_loss(z, t([0.5, 0.5, 0.5]), 5.0)
    close(tie, [0.7244055117, 0.4277353778, 0.4054651081])
    parts = [losses.rao_kupper_loss(z, torch.full_like(z, y), 5.0) for y in (0.0, 0.5, 1.0)]
    close(sum((-part).exp() for part in parts), [1.0, 1.0, 1.0])
    close(losses.flip_rate_of(2 * 0.1 * 0.9), 0.1)
    with pytest.raises(ConfigError, match="flip_rate"):
        losses.forward_corrected_loss(z, 0.5)
    with pytest.raises(ConfigError, match="at least 0"):
        losses.margin_loss(z, -0.1)


def test_strength_of_labels() -> None:
    margins = t([[1.2, 0.8, 1], [-0.5, -0.1, -0.9], [0.2, -0.1, 0.05]])
    mean, deviation, soft = losses.label_strength(margins)
    close(mean, [1, -0.5, 0.05])
    close(deviation, [0.1632993162, 0.3265986324, 0.1224744871])
    close(soft, [0.7310585786, 0.3775406688, 0.5124973965])
    found = losses.preference_loss(torch.full_like(soft, 0.7), soft)
    close(found, [0.5914450438, 0.8389075807, 0.7444378713])


def test_quantiles() -> None:
    levels, quantiles = t([0.1, 0.5, 0.9]), t([-0.5, 0.2, 1])
    rows = losses.pinball_loss(quantiles, t([0, 0.6, -1]), levels)
    close(rows, [[0.05, 0.1, 0.1], [0.11, 0.2, 0.04], [0.45, 0.6, 0.2]])
    close(rows.mean(), 0.2055555556)
    close(losses.quantile_preference(quantiles[None], t([[-1, 0, 0.4]]))[0], 0.5905652493)


def test_nuisances() -> None:
    rewards = t([1, -0.3, 0.6, 0.2])
    nuisances = t([[0.4, -0.1], [-0.2, 0.3], [0.5, 0], [-0.3, -0.2]])
    found = losses.nuisance_correlations(rewards, nuisances)
    close(found, [0.7803834058, -0.5035825631])
    close(found.square().sum(), 0.8625936579)
    close(losses.explained_share(rewards, nuisances), 0.7644295302)
    signs = t([1, -1, 1, -1])
    close(losses.nuisance_correlations(rewards * signs, nuisances * signs[:, None]), found.tolist())


def test_pal_a() -> None:
    weights = pal.user_weights(t([0.7, -0.2]))
    close(weights, [0.7109495026, 0.2890504974])
    points = (weights @ torch.eye(2, dtype=torch.float64))[None]
    first, second = (pal.pal_a_distances(t([x]), points) for x in ([1, 0.5], [0.2, -0.4]))
    close(torch.cat([first, second]), [0.3578405828, 0.8578228151])
    close(losses.preference_loss(second - first), [0.4740836922])
    close(pal.pal_a_hinge(first, second), [0.5000177677])
    given = t([[0.3, 0.7]])
    distances = [pal.pal_a_distances(t([x]), given) for x in ([1, 0.5], [0.2, -0.4])]
    close(torch.cat(distances), [0.7280109889, 1.1045361017])
    close(losses.preference_loss(distances[1] - distances[0]), [0.5225023155])


def test_a_new_user_from_a_few_pairs() -> None:
    margins, labels = t([[1, -1], [0.8, 0.2], [0.5, -1.5]]), t([1, -1, 1])
    logits = pal.fit_user(margins, labels)
    torch.testing.assert_close(logits, t([0.3420676399, -0.3420676399]), rtol=0, atol=1e-6)
    close(pal.user_objective(t([0.3420676399, -0.3420676399]), margins, labels, 1.0), 2.4778264914)
    close(pal.user_objective(t([0, 0]), margins, labels, 1.0), 2.6413011489)
    close(pal.prototype_posterior(margins, labels), [0.8646399014, 0.1353600986])
    # A pair of weight 2 is two pairs.
    known, twice = t([[1, 0], [-1, 0.5]]), torch.tensor([0, 0, 1, 2])
    repeated = pal.fit_new_user(margins[twice], labels[twice], known)
    weighted = pal.fit_new_user(margins, labels, known, weight=t([2, 1, 1]))
    torch.testing.assert_close(weighted, repeated, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["a", "b"])
def test_a_new_user_is_fitted_to_the_scores_that_the_reward_gives(form: str) -> None:
    """A cosine with a mixture of points is no mixture of cosines."""
    torch.manual_seed(0)
    head = PalHead(4, users=3, prototypes=2, form=form).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        head.log_scale.fill_(1.0)
    first, second, text = torch.randn(3, 8, 4, dtype=torch.float64)
    margins, labels = head.margins(first, second, text, 2.0), t([1, -1, 1, 1, -1, 1, 1, -1])
    weights = t([0.3, 0.7])
    shares = weights.expand(8, -1)
    difference = head.score(first, text, shares) - head.score(second, text, shares)
    torch.testing.assert_close(pal.margins_by(margins, weights), 2 * difference.detach())
    start = t([0.5, -0.5])
    logits = pal.fit_user(margins, labels, start=start)
    grid = torch.linspace(-2, 2, 41, dtype=torch.float64)
    lowest = min(
        float(pal.user_objective(torch.stack([a, b]), margins, labels, 1.0, start))
        for a in grid
        for b in grid
    )
    assert float(pal.user_objective(logits, margins, labels, 1.0, start)) <= lowest + 1e-9
    assert all(parameter.grad is None for parameter in head.parameters())
    known = head.logits.detach()
    likely = pal.likely_user(margins, labels, known)
    by_user = torch.stack([margins(row) for row in known.softmax(1)], 1)
    expected = pal.prototype_posterior(by_user, labels) @ known
    torch.testing.assert_close(likely, expected)


def test_pal_b() -> None:
    prototypes = t([[[1, 0], [0, 1]], [[0.5, 0.5], [-1, 0.2]]])
    weights = t([[0.25, 0.75], [0.9, 0.1]])
    points = pal.pal_b_points(prototypes, weights)
    close(points, [[0.25, 0.75], [0.35, 0.47]])
    first, second = t([[0.6, 0.8], [0, 1]]), t([[1, -0.2], [0.8, 0.6]])

    def margin(form: str, at: Tensor = points) -> Tensor:
        return pal.pal_b_scores(first, at, form) - pal.pal_b_scores(second, at, form)

    close(margin("dot"), [0.65, -0.092])
    close(losses.preference_loss(margin("dot")), [0.4200553357, 0.7402048076])
    close(margin("angle"), [11.7806937637, -2.2427953237])
    close(losses.preference_loss(margin("angle")).mean(), 1.1718493693)
    close(margin("distance"), [0.8568184531, -0.1667362432])
    hard = torch.nn.functional.one_hot(weights.argmax(1), 2).double()
    close(margin("dot", pal.pal_b_points(prototypes, hard)), [1.0, -0.2])
    # With one prototype nobody differs. Equal ones give the weights no gradient.
    close(pal.pal_b_points(prototypes[:, :1], t([[1.0], [1.0]])), prototypes[:, 0].tolist())
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    same = prototypes[:, :1].expand(-1, 2, -1)
    pal.pal_b_scores(first, pal.pal_b_points(same, logits.softmax(1))).sum().backward()
    close(logits.grad, [[0.0, 0.0], [0.0, 0.0]])


def test_calibration() -> None:
    confidence = t([0.55, 0.62, 0.71, 0.93, 0.88, 0.97, 0.52, 0.81])
    hits = t([1, 0, 1, 1, 1, 1, 0, 0])
    close(calibration.expected_calibration_error(confidence, hits), 0.22125)
    z, y = t([2, -1, 0.5, 3, -0.2]), t([1, 0, 0, 1, 1])
    close(calibration.fit_temperature(z, y), 1.2572925438)
    close(calibration.likelihood(1.2572925438 * z, y), 0.4467370648)
    close(calibration.likelihood(z, y), 0.4521985807)
    with pytest.warns(UserWarning, match="say nothing"):
        assert calibration.fit_temperature(z, t([1, 1, 1, 0, 0])) == 1e-3
    close(calibration.wilson_interval(70, 100)[0], 0.6041514537)
    close(calibration.wilson_interval(70, 100)[1], 0.7810511471)
    prompts = ["a", "a", "a", "b", "c", "c"]
    close(calibration.prompt_mean([1, 1, 0, 1, 0, 1], prompts), 0.7222222222)


@pytest.mark.parametrize("name", ["pick", "list", "forward", "tie", "pal", "nuisance", "rating"])
def test_gradients(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    extra = torch.randn(6, 3, dtype=torch.float64)
    labels = t([1, 0, 0.5, 1, 0.5, 0])

    def function(value: Tensor) -> Tensor:
        if name == "pick":
            both = torch.stack([value, value.flip(0) * 0.3], 1)
            return losses.pickscore_loss(both, labels, t([1, 2, 2, 1, 3, 3]))[0]
        if name == "list":
            return losses.ranked_list_loss(value, torch.tensor([1, 3, 2, 2, 5, 4])).mean()
        if name == "forward":
            return losses.forward_corrected_loss(value, 0.2).mean()
        if name == "tie":
            return losses.rao_kupper_loss(value, labels, 2.0).mean()
        if name == "pal":
            points = pal.pal_b_points(extra.view(2, 3, 3), value.view(2, 3).softmax(1))
            return pal.pal_b_scores(extra[:2], points).sum()
        if name == "nuisance":
            return losses.nuisance_correlations(value, extra).square().sum()
        return -losses.rating_probabilities(value, t([-1, 0, 1])).log()[:, 1].mean()

    assert torch.autograd.gradcheck(function, (x,), eps=1e-6, atol=1e-6)


def test_shifts_and_exchanges_change_nothing() -> None:
    scores, labels = torch.randn(5, 2, dtype=torch.float64), t([1, 0, 0.5, 1, 0])
    counts = t([1, 1, 2, 2, 3])
    loss = losses.pickscore_loss(scores, labels, counts)[0]
    close(losses.pickscore_loss(scores + 3, labels, counts)[0], loss.item())
    close(losses.pickscore_loss(scores.flip(1), 1 - labels, counts)[0], loss.item())
    close(losses.pickscore_loss(scores, labels, 7 * counts)[0], loss.item())
