"""Rewards trained on the embedded world: wrong labels, people who disagree, a nuisance.

    python benchmarks/rewards.py [--seeds 3] [--work FOLDER] [--output FILE]

The base is a CLIP of the embedded world that has seen captions and no preference:
the ``base`` of `tools.shapes.reward_data`. Images are drawn by the
embedded pipeline: four for each of the 600 training prompts, at guidance 1, 2, 3 and 5,
and six for each of 60 held-out prompts. A label is drawn by P(a over b) =
sigmoid((u_a - u_b) / 0.05). All accuracies are on held-out prompts and without noise:
how often the reward orders two images as the utility u does, every prompt counts the
same. The tables have the mean over seeds, and the lowest and highest seed.

*Labels*: u is the verifier's graded score, a share of the labels of 3,600 pairs is
turned round, with plain likelihood and corrected for it; `shapes-clip` was trained on
as many pairs with 10 % turned round. *Towers*: the recipe of `shapes-clip`
(`configs/reward/shapes_clip.yaml`) and its data; seed 0 made the shipped one.
*People*: two groups of people with opposite tastes. *Tints*: every image gets a warm
or cool tint of a random strength up to 12 %, as in Pick-a-Filter (Chen et al. 2024).
Images of which the verifier then reads another attribute are left out. u is the graded
score plus 0.3 times the strength, warm for one half of the people and cool for the
other; with a taste of 0 they agree. *Styles*: u is the share of right attributes times
0.8, plus 0.3, 0.6 or 1 for the preferred style for one half and minus as much for the
other. 20 people give 60 or 150 votes each, or 40 people 20 votes with 10 % turned
round. One reward for all, against PAL with two prototypes, for each person's own u: its
linear form, which is the default, and PAL-B. Twelve new people of the linear form give
2 to 16 votes, on random pairs or each on that of four pairs on which the known people
disagree most by the PAL reward.
*Nuisance*: u is the graded score, plus six times the difference in mean brightness that
the labels prefer. Accuracy is by the graded score. *Votes*: u is the graded score,
without labels that are turned round. Pairs to vote on are taken at random, or each is
the one that would teach the reward most (`Doubt` of the demo): of 8 pairs of the four
images of two prompts, of 32 pairs of eight prompts, or of all pairs that are left. The
reward is trained again every 40 votes. There are ten times as many seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from leaderboard import ROOT, kept

from diffalign.reward_training import RewardConfig, RewardTrainer
from diffalign.reward_training.features import embed
from diffalign.reward_training.fit_head import directions_of, margins_of
from diffalign.reward_training.fit_pal import pal_margins
from diffalign.reward_training.judgements import Judgements
from diffalign.reward_training.pair_tensors import Pairs
from diffalign.rewards import load_scorer
from diffalign.rewards.learned.calibration import disagreement
from diffalign.rewards.learned.information import after_label, information_gain, label_information
from diffalign.rewards.learned.pal import fit_new_user
from diffalign.shapes.prompts import held_out_prompts, train_prompts
from diffalign.shapes.tokenizer import build_tokenizer

Array = npt.NDArray[np.float64]
TEMPERATURE, PROMPTS, TRAINED, TESTED, HELD_OUT = 0.05, 600, 4, 60, 6
STEPS = 10  # of the sampler
AT_ONCE, VOTES = 40, 320
RANDOM = "random pairs"
ARMS = {
    RANDOM: 1,
    "the best of 8 pairs": 8,
    "the best of 32 pairs": 32,
    "the best of all pairs": None,
}
"""Name -> among how many pairs each is chosen."""


class World:
    """Images with what is true of them, and their embeddings by the base."""

    def __init__(self, work: Path, count: int = PROMPTS) -> None:
        self.count = count
        sys.path.append(str(ROOT))
        from PIL import Image

        from tools.shapes import reward_data

        folder = self.folder = work / "captions"
        if not (folder / "config.json").is_file():
            config = reward_data.RewardDataConfig()
            torch.manual_seed(config.seed)
            tokenizer = build_tokenizer()
            model = reward_data.build_model(tokenizer)
            reward_data.warm_up(config, model, tokenizer, train_prompts())
            reward_data.save(folder, model.eval(), tokenizer)
        self.base = load_scorer("shapes-clip", model=str(folder), device="cpu")
        prompts = [*train_prompts()[:count], *held_out_prompts()[:TESTED]]
        drawn = work / "drawn"
        drawn.mkdir(parents=True, exist_ok=True)
        pixels = [
            reward_data.draw(drawn, "train", prompts[:count], TRAINED, STEPS, 51_000_000),
            reward_data.draw(drawn, "held-out", prompts[count:], HELD_OUT, STEPS, 52_000_000),
        ]
        flat = np.concatenate([part.reshape(-1, 64, 64, 3) for part in pixels])
        counts = [TRAINED] * count + [HELD_OUT] * (len(prompts) - count)
        self.prompt = np.repeat(np.arange(len(prompts)), counts)

        def truth() -> Any:
            sides = [(pixels[0], prompts[:count]), (pixels[1], prompts[count:])]
            scores = [reward_data.verifier_scores(*side) for side in sides]
            parts = [reward_data.verifier_parts(*side) for side in sides]
            return [
                np.concatenate([each.ravel() for each in scores]).tolist(),
                np.concatenate([right.ravel() for right, _ in parts]).tolist(),
                np.concatenate([style.ravel() for _, style in parts]).tolist(),
            ]

        values = kept(work / "truth.json", truth)
        self.score, self.right, self.style = (np.array(each) for each in values)
        self.brightness = flat.mean((1, 2, 3)) / 255
        self.judgements = Judgements(
            prompts, [str(i) for i in range(len(flat))], lambda i: Image.fromarray(flat[i])
        )
        self.cache = work / "cache"
        self.features = embed(self.base, self.judgements, self.cache)

    def pairs(self, held_out: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """All pairs of images of one prompt."""
        first, second = [], []
        held = range(self.count, int(self.prompt.max()) + 1)
        for prompt in held if held_out else range(self.count):
            images = np.flatnonzero(self.prompt == prompt)
            for a in range(len(images)):
                for b in range(a + 1, len(images)):
                    first.append(images[a])
                    second.append(images[b])
        return np.array(first), np.array(second)

    def judged(
        self, first: Any, second: Any, label: Array, user: Any = None, users: Any = ()
    ) -> Judgements:
        """Judgements of some pairs."""
        number = np.full(len(first), -1) if user is None else user
        return Judgements(
            self.judgements.prompts, self.judgements.images, self.judgements.open,
            first, second, self.prompt[first], label, number, users=list(users),
        )  # fmt: skip


class Tinted(World):
    """The images of a world with a warm or cool tint of a random strength each."""

    STRENGTH = 0.12

    def __init__(self, world: World) -> None:
        vars(self).update(vars(world))
        from PIL import Image

        from diffalign.shapes.verifier import attribute_table

        count = len(world.prompt)
        before = np.stack([np.asarray(world.judgements.open(i)) for i in range(count)])
        self.tint = np.random.default_rng(9).uniform(-1, 1, count)
        factor = 1 + self.STRENGTH * self.tint[:, None] * np.array([1, 0, -1])
        after = (before * factor[:, None, None]).clip(0, 255).round().astype(np.uint8)
        texts = [world.judgements.prompts[p] for p in world.prompt]
        read = [
            attribute_table([Image.fromarray(each) for each in pixels], texts)
            for pixels in (before, after)
        ]
        self.same = np.array([one == other for one, other in zip(*read, strict=True)])
        self.judgements = Judgements(
            world.judgements.prompts,
            [f"tinted-{self.STRENGTH}-{i}" for i in range(count)],
            lambda i: Image.fromarray(after[i]),
        )
        self.features = embed(self.base, self.judgements, self.cache)

    def pairs(self, held_out: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        first, second = super().pairs(held_out)
        same = self.same[first] & self.same[second]
        return first[same], second[same]


def drawn_labels(lead: Array, noise: np.random.Generator, flips: float = 0.0) -> Array:
    wins = noise.random(len(lead)) < 1 / (1 + np.exp(-lead / TEMPERATURE))
    return (wins ^ (noise.random(len(lead)) < flips)).astype(np.float64)


def fitted(
    world: World, data: Judgements, seed: int, **settings: Any
) -> tuple[Any, RewardTrainer, Any]:
    """The head, its trainer and the covariance of its weights. No folder is written."""
    args = RewardConfig(output_dir="never-written", seed=seed, **settings)
    trainer = RewardTrainer("shapes-clip", args, data, model_path=str(world.folder))
    written: list[Any] = []
    trainer._write = lambda *parts: written.append(parts)  # type: ignore[method-assign]
    import diffalign.reward_training.trainer as module

    module.embed = lambda *_: world.features
    trainer.train()
    head, _, _, covariance = written[0]
    return head, trainer, covariance


def right_share(margins: torch.Tensor, lead: Array, prompts: Array) -> float:
    """Accuracy on pairs that differ, every prompt counts the same."""
    differ = np.abs(lead) > 1e-6
    hits = (margins.detach().numpy() > 0) == (lead > 0)
    means = [hits[(prompts == p) & differ].mean() for p in np.unique(prompts[differ])]
    return float(np.mean(means))


def held_out_pairs(world: World, trainer: RewardTrainer) -> tuple[Pairs, Array, Array]:
    first, second = world.pairs(True)
    data = world.judged(first, second, np.ones(len(first)))
    return trainer._pairs(data, world.features), first, second


def labels(world: World, seed: int) -> dict[str, float]:
    noise = np.random.default_rng(seed)
    first, second = world.pairs(False)
    found = {}
    for flips in (0.0, 0.1, 0.2, 0.3):
        label = drawn_labels(world.score[first] - world.score[second], noise, flips)
        data = world.judged(first, second, label)
        for name, rate in (("plain", 0.0), ("corrected", flips)):
            if name == "corrected" and not flips:
                continue
            head, trainer, _ = fitted(world, data, seed, flip_rate=rate)
            pairs, a, b = held_out_pairs(world, trainer)
            lead = world.score[a] - world.score[b]
            found[f"{flips:.0%} turned round, {name}"] = right_share(
                margins_of(head, pairs).mean(1), lead, world.prompt[a]
            )
    lead = world.score[a] - world.score[b]
    found["its base"] = right_share(pairs.base[:, 0] - pairs.base[:, 1], lead, world.prompt[a])
    shipped = load_scorer("shapes-clip", device="cpu")
    other = embed(shipped, world.judgements, world.cache)
    text = other.text[world.prompt[a]].float()
    sides = [shipped.similarity(other.image[i].float(), (text,)) for i in (a, b)]  # type: ignore[attr-defined]
    found["shapes-clip (all weights trained, 3,600 pairs)"] = right_share(
        sides[0] - sides[1], lead, world.prompt[a]
    )
    return found


def towers(world: World, seed: int) -> dict[str, float]:
    work = world.folder.parent
    return dict(kept(work / f"towers-{seed}.json", lambda: trained_towers(world, work, seed)))


def trained_towers(world: World, work: Path, seed: int) -> dict[str, float]:
    """All weights, by the recipe of `shapes-clip` and its data."""
    sys.path.append(str(ROOT))
    from diffalign.recipe import read_yaml
    from diffalign.reward_training.run_file import reward_run_from_dict
    from tools.shapes import reward_data

    data = work / "shapes-clip"
    reward_data.run(data, reward_data.RewardDataConfig())
    run = reward_run_from_dict(read_yaml(ROOT / "configs" / "reward" / "shapes_clip.yaml"))
    args = dataclasses.replace(
        run.train,
        output_dir=str(work / f"towers-{seed}"),
        overwrite_output_dir=True,
        seed=seed,
        anchor_data=str(data / "captions.parquet"),
        logging_steps=100,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    begin = time.perf_counter()
    source = str(data / "preferences")
    folder = RewardTrainer("shapes-clip", args, source, model_path=str(data / "base")).train()
    minutes = (time.perf_counter() - begin) / 60
    torch.set_num_threads(threads)
    a, b = world.pairs(True)
    held = np.unique(np.concatenate([a, b]))
    images = [world.judgements.open(int(i)) for i in held]
    texts = [world.judgements.prompts[world.prompt[i]] for i in held]

    def right(scorer: Any) -> float:
        scores = np.zeros(len(world.prompt))
        scores[held] = scorer.score(images, texts).values.numpy()
        margins = torch.from_numpy(scores[a] - scores[b])
        return right_share(margins, world.score[a] - world.score[b], world.prompt[a])

    return {
        "the recipe of shapes-clip": right(load_scorer(str(folder), device="cpu")),
        "shapes-clip": right(load_scorer("shapes-clip", device="cpu")),
        "minutes": minutes,
    }


def people(world: World, seed: int) -> dict[str, float]:
    tinted = Tinted(world)
    of_tints = {
        f"{name}: {row}": value
        for name, taste, users, votes, flips in (
            ("tints, 20 people, 60 votes", 0.3, 20, 60, 0.0),
            ("tints, 40 people, 20 votes", 0.3, 40, 20, 0.1),
            ("tints, taste 0, 20 people, 60 votes", 0.0, 20, 60, 0.0),
        )
        for row, value in of_people(
            tinted, seed, tinted.score, taste * tinted.tint, users, votes, flips
        ).items()
    }
    return of_tints | {
        f"styles, taste {taste:g}, 20 people, {votes} votes: {row}": value
        for taste, votes in ((0.3, 60), (0.6, 60), (1.0, 150))
        for row, value in of_people(
            world, seed, world.right / 5 * 0.8, taste * world.style, 20, votes
        ).items()
    }


def of_people(
    world: World,
    seed: int,
    agreed: Array,
    taste: Array,
    users: int,
    votes: int,
    flips: float = 0.0,
) -> dict[str, float]:
    """What rewards reach for people who like `agreed` plus or minus `taste`."""
    noise = np.random.default_rng(100 + seed)
    first, second = world.pairs(False)
    newcomers = range(users, users + 12)
    signs = np.where(np.arange(users + len(newcomers)) % 2, -1.0, 1.0)

    def utility(user: int) -> Array:
        return agreed + signs[user] * taste

    def answers_of(user: int, rows: Any = slice(None)) -> Array:
        u = utility(user)
        return drawn_labels(u[first[rows]] - u[second[rows]], noise, flips)

    def vote(user: int, count: int) -> tuple[Array, Array, Array]:
        rows = noise.choice(len(first), count, replace=False)
        return first[rows], second[rows], answers_of(user, rows)

    parts = [vote(user, votes) for user in range(users)]
    a, b, label = (np.concatenate([part[i] for part in parts]) for i in range(3))
    names = [f"user {i}" for i in range(users)]
    judges = np.repeat(np.arange(users), votes)
    data = world.judged(a, b, label, judges, names)
    one, trainer, _ = fitted(world, data, seed)
    pal, _, _ = fitted(world, data, seed, head="pal")
    pal_b, _, _ = fitted(world, data, seed, head="pal", pal_form="b")
    known = [
        fitted(world, data.rows(np.flatnonzero(signs[judges] == sign)), seed)[0]
        for sign in (1.0, -1.0)
    ]
    pairs, x, y = held_out_pairs(world, trainer)
    rows = (
        "one reward",
        "one reward per group, if the groups were known",
        "PAL, linear",
        "PAL-B",
        "share of people in the right group, PAL, linear",
    )
    found: dict[str, list[float]] = {row: [] for row in rows}
    logits = pal.logits.detach()
    agrees = (logits.softmax(1).argmax(1).numpy() == (signs[:users] > 0)).mean()
    for user in range(users):
        lead = utility(user)[x] - utility(user)[y]
        pairs.user = torch.full_like(pairs.user, user)
        for row, margins in (
            (rows[0], margins_of(one, pairs).mean(1)),
            (rows[1], margins_of(known[0 if signs[user] > 0 else 1], pairs).mean(1)),
            (rows[2], pal_margins(pal, pairs)),
            (rows[3], pal_margins(pal_b, pairs)),
        ):
            found[row].append(right_share(margins, lead, world.prompt[x]))
    found[rows[4]] = [max(agrees, 1 - agrees)]
    pool = trainer._pairs(world.judged(first, second, np.ones(len(first))), world.features)
    on_pool, on_held_out = (pal.margins(of.first, of.second, of.text) for of in (pool, pairs))
    by_person = torch.stack([on_pool(row) for row in logits.softmax(1)], 1)
    doubts = disagreement(by_person).numpy()
    for user in newcomers:
        u = utility(user)
        answers = answers_of(user)
        signed = torch.from_numpy(np.where(answers > 0.5, 1.0, -1.0))
        fours = noise.permutation(len(first))[: 4 * 16].reshape(16, 4)
        for name, asked in (
            ("random pairs", fours[:, 0]),
            ("pairs of disagreement", fours[np.arange(16), doubts[fours].argmax(1)]),
        ):
            for count in (2, 4, 8, 16):
                shown = asked[:count]
                margins = pal.margins(pool.first[shown], pool.second[shown], pool.text[shown])
                person = fit_new_user(margins, signed[shown], logits)
                share = right_share(on_held_out(person.softmax(0)), u[x] - u[y], world.prompt[x])
                found.setdefault(f"new person, {count} votes, {name}", []).append(share)
    return {name: float(np.mean(values)) for name, values in found.items()}


def nuisance(world: World, seed: int) -> dict[str, float]:
    noise = np.random.default_rng(200 + seed)
    first, second = world.pairs(False)
    utility = world.score + 6 * world.brightness
    data = world.judged(first, second, drawn_labels(utility[first] - utility[second], noise))
    found = {}
    for weight in (0.0, 1.0, 10.0):
        head, trainer, _ = fitted(world, data, seed, nuisance=weight)
        pairs, a, b = held_out_pairs(world, trainer)
        margins = margins_of(head, pairs).mean(1).detach()
        lead = world.score[a] - world.score[b]
        bright = torch.from_numpy(world.brightness[a] - world.brightness[b])
        rho = float((margins * bright).sum() / (margins.norm() * bright.norm()))
        found[f"penalty {weight:g}: accuracy"] = right_share(margins, lead, world.prompt[a])
        found[f"penalty {weight:g}: correlation with brightness"] = rho
    return found


def active(world: World, seed: int) -> dict[str, float]:
    noise = np.random.default_rng(300 + seed)
    first, second = world.pairs(False)
    label = drawn_labels(world.score[first] - world.score[second], noise)
    order = noise.permutation(len(first))
    held_out: tuple[Pairs, Array, Array] | None = None
    reached = {}
    for name, among in ARMS.items():
        asked = order[:AT_ONCE]
        while True:
            data = world.judged(first[asked], second[asked], label[asked])
            head, trainer, covariance = fitted(world, data, seed)
            held_out = held_out or held_out_pairs(world, trainer)
            pairs, a, b = held_out
            lead = world.score[a] - world.score[b]
            share = right_share(margins_of(head, pairs).mean(1), lead, world.prompt[a])
            reached[f"{len(asked)} votes, {name}"] = share
            if len(asked) >= VOTES:
                break
            if name == RANDOM:
                asked = order[: len(asked) + AT_ONCE]
                continue
            left = np.setdiff1d(order, asked, assume_unique=True)
            rows = world.judged(first[left], second[left], label[left])
            pool = trainer._pairs(rows, world.features)
            chosen = questions(head, covariance, pool, world.prompt[first[left]], among, noise)
            asked = np.concatenate([asked, left[chosen]])
    return reached


@torch.no_grad()
def questions(
    head: Any,
    covariance: Any,
    pool: Pairs,
    prompts: Any,
    among: int | None,
    noise: np.random.Generator,
) -> list[int]:
    """The next pairs to vote on, one after the other, as the demo chooses them."""
    directions = directions_of(head, pool)
    information = label_information(margins_of(head, pool).mean(1))
    is_open, chosen = np.ones(len(prompts), dtype=bool), []
    while len(chosen) < AT_ONCE:
        candidates = np.flatnonzero(is_open)
        if among is not None:
            drawn = noise.choice(np.unique(prompts), among // 4, replace=False)
            of_them = np.isin(prompts[candidates], drawn)
            candidates = noise.permutation(candidates[of_them])[:among]
            if not len(candidates):
                continue
        gains = information_gain(directions[candidates], information[candidates], covariance)
        place = int(candidates[int(gains.argmax())])
        chosen.append(place)
        is_open[place] = False
        covariance = after_label(covariance, directions[place], information[place])
    return chosen


def votes_table(runs: list[dict[str, float]]) -> list[str]:
    """Accuracy by votes, and how much more than with random pairs, 95 % over seeds."""
    counts = range(AT_ONCE, VOTES + 1, AT_ONCE)
    values = {
        arm: np.array([[run[f"{count} votes, {arm}"] for count in counts] for run in runs])
        for arm in ARMS
    }
    lines = [f"| votes | {' | '.join(ARMS)} |", "|---" * (len(ARMS) + 1) + "|"]
    for i, count in enumerate(counts):
        row = [f"{values[RANDOM][:, i].mean():.3f}"]
        for arm in list(ARMS)[1:]:
            gains = values[arm][:, i] - values[RANDOM][:, i]
            half = 1.96 * gains.std(ddof=1) / np.sqrt(len(runs))
            row.append(
                f"{values[arm][:, i].mean():.3f} ({gains.mean():+.3f}, {gains.mean() - half:+.3f} "
                f"to {gains.mean() + half:+.3f})"
            )
        lines.append(f"| {count} | {' | '.join(row)} |")
    goal = values[RANDOM][:, -1].mean()
    for arm in list(ARMS)[1:]:
        means = values[arm].mean(0)
        enough = [count for count, mean in zip(counts, means, strict=True) if mean >= goal]
        reach = f"with {enough[0]} votes" if enough else "not"
        lines += ["", f"The {goal:.3f} of {VOTES} random votes is reached {reach} by {arm}."]
    return lines


PARTS: dict[str, Callable[[World, int], dict[str, float]]] = {
    "Labels": labels,
    "Towers": towers,
    "People": people,
    "Nuisance": nuisance,
    "Votes": active,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/rewards"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "rewards.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = World(options.work)
    title, _, explained = (__doc__ or "").split("\n\n", 2)
    lines = [f"# {title.split(':')[0]}", "", "`python benchmarks/rewards.py`"]
    lines += ["", explained.strip()]
    for name in options.parts:
        part = PARTS[name]
        begin = time.time()
        count = options.seeds * (10 if name == "Votes" else 1)
        runs = [part(world, seed) for seed in range(count)]
        spent = (time.time() - begin) / count
        lines += ["", f"## {name}", ""]
        if name != "Towers":  # whose trainings may be finished, and which has its own minutes
            lines += [f"{spent:.0f} s for a seed.", ""]
        if name == "Votes":
            lines += votes_table(runs)
            print("\n".join(lines[-20:]), flush=True)
            continue
        lines += ["| | mean | seeds |", "|---|---|---|"]
        for row in runs[0]:
            values = [run[row] for run in runs]
            seeds = f"{min(values):.3f} to {max(values):.3f}"
            lines.append(f"| {row} | {np.mean(values):.3f} | {seeds} |")
        print("\n".join(lines[-len(runs[0]) :]), flush=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
