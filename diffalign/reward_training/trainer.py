"""Train a reward, and add a user to one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..rewards.learned.calibration import fit_temperature
from ..rewards.learned.heads import PalHead, RewardHead
from ..rewards.learned.pal import fit_user, likely_user
from ..rewards.registry import load_scorer
from ..rewards.scorers.trained import (
    FILE,
    FORMAT,
    WEIGHTS,
    TrainedReward,
    base_fingerprint,
    build_head,
    read_facts,
)
from ..runtime.files import save_tensors, write_atomically
from ..runtime.versions import versions
from .config import RewardConfig
from .features import Features, check_base, embed
from .fit import Pairs, fit_head, fit_pal, make_pairs, margins_of, pal_margins
from .judgements import Judgements, read_judgements, split
from .report import card, draw_calibration, measure

REPORT = "report.json"


class RewardTrainer:
    """Trains a reward on judgements, over the frozen towers of a CLIP scorer.

    Args:
        model (`str` or scorer): The base: a CLIP scorer or its name.
        args (`RewardConfig`, *optional*): The settings.
        train_dataset (*optional*): Anything that `load_preferences` reads (pairs,
            ranked lists, likes and dislikes), or a folder of the demo's votes.
        eval_dataset (*optional*): The same, for the report. None holds out prompts of
            `train_dataset`.
        model_path (`str`, *optional*): Weights of the base. None takes the published.
        columns (`dict`, *optional*): See `load_preferences`.

    Raises:
        ConfigError, UserError: The base, the settings or the data cannot be used.

    Example:
        ```python
        trainer = RewardTrainer(
            "shapes-clip", RewardConfig(output_dir="rewards/mine"), "votes"
        )
        folder = trainer.train()
        scorer = load_scorer(str(folder))
        ```
    """

    def __init__(
        self,
        model: Any,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        model_path: str | None = None,
        columns: dict[str, str] | None = None,
    ) -> None:
        self.args = args or RewardConfig()
        self.folder = Path(self.args.output_dir)
        self._check_folder()
        if train_dataset is None:
            raise ConfigError("data", "no judgements: name a dataset or a folder of votes")
        options: dict[str, Any] = {"columns": columns} if columns else {}
        self.judgements = read_judgements(train_dataset, **options)
        self.parts = split(self.judgements, self.args.val, self.args.test, self.args.seed)
        self.held_out = self.parts["test"]
        if eval_dataset is not None:
            self.held_out = read_judgements(eval_dataset, **options)
            both = set(self.held_out.prompts) & set(self.judgements.prompts)
            if both:
                raise UserError(
                    f"eval_dataset: {len(both)} of its prompts are also trained on, such as "
                    f"{min(both)!r}; give other prompts"
                )
        if self.args.head == "pal":
            self._check_users()
        self.base: Any = load_scorer(model, model=model_path) if isinstance(model, str) else model
        check_base(self.base)
        self.model_path = model_path

    def _check_folder(self) -> None:
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        if not self.args.overwrite_output_dir:
            raise UserError(
                f"reward.output_dir: {str(self.folder)!r} is not empty; choose another folder, or "
                "set reward.overwrite_output_dir: true"
            )
        if not (self.folder / FILE).is_file():
            raise UserError(
                f"reward.output_dir: {str(self.folder)!r} holds something else than a reward; "
                "choose another folder"
            )

    def _check_users(self) -> None:
        users = self.judgements.user[self.judgements.user >= 0]
        if not len(users):
            raise UserError("reward.head: pal needs a column user_id (or votes with names)")
        counts = np.bincount(users)
        few = [name for name, n in zip(self.judgements.users, counts, strict=True) if n < 2]
        if few:
            raise UserError(
                f"reward.head: {len(few)} users have a single judgement, such as {few[0]!r}; pal "
                "needs at least two of each (add_user fits a new user to a finished reward)"
            )

    def train(self) -> Path:
        """Train, measure and write the folder.

        Returns:
            `Path`: The folder, for `load_scorer`.
        """
        args = self.args
        cache = Path(args.cache) if args.cache else None
        features = embed(self.base, self.judgements, cache)
        train, val = (self._pairs(self.parts[name], features) for name in ("train", "val"))
        head: RewardHead | PalHead
        if args.head == "pal":
            head, chosen = fit_pal(train, val, len(self.judgements.users), args)
        else:
            head, chosen = fit_head(train, val, args)
        if self.held_out is self.parts["test"]:
            test = self._pairs(self.held_out, features)
        else:
            test = self._pairs(self.held_out, embed(self.base, self.held_out, cache))
        with torch.no_grad():
            temperature = fit_temperature(self._margins(head, val), val.label)
            margins = temperature * self._margins(head, test)
            leads = test.base[:, 0] - test.base[:, 1]
        report = measure(
            margins, leads, test.label, test.prompt, test.user, self.held_out.users, test.nuisances
        )
        facts = self._facts(head, temperature, chosen)
        self._write(head, facts, report)
        return self.folder

    def _pairs(self, part: Judgements, features: Features) -> Pairs:
        base: Any = self.base

        @torch.no_grad()
        def score(image: Tensor, text: Tensor) -> Tensor:
            device = base.device
            return (
                base.similarity(image.float().to(device), (text.float().to(device),)).cpu().double()
            )

        return make_pairs(part, features, score, self.args.prompt_weights)

    def _margins(self, head: RewardHead | PalHead, pairs: Pairs) -> Tensor:
        if isinstance(head, PalHead):
            return pal_margins(head, pairs)
        return margins_of(head, pairs).mean(1)

    def _facts(
        self, head: RewardHead | PalHead, temperature: float, chosen: dict[str, float]
    ) -> dict[str, Any]:
        args, data = self.args, self.judgements
        dim = int(self.base.embed([data.open(0)]).shape[1])
        described: dict[str, Any] = {"kind": args.head, "dim": dim}
        if isinstance(head, PalHead):
            described |= {
                "users": data.users,
                "prototypes": args.prototypes,
                "hidden": args.user_hidden,
            }
        else:
            described |= {"members": args.members, "hidden": args.hidden}
        sizes = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items())
        return {
            "format": FORMAT,
            "name": self.folder.resolve().name,
            "versions": versions(),
            "summary": f"a reward trained on {len(data):,} judgements, over {self.base.spec.key}",
            "base": {
                "scorer": self.base.spec.key,
                "model": self.model_path,
                "fingerprint": base_fingerprint(self.base),
                "backbone": self.base.spec.backbone,
            },
            "head": described,
            "temperature": temperature,
            "settings": dataclasses.asdict(args),
            "chosen": chosen,
            "data": {
                "pairs": len(data),
                "prompts": len(data.prompts),
                "images": len(data.images),
                "users": len(data.users),
                "ties": int((data.label == 0.5).sum()),
                "fingerprint": data.fingerprint(),
                "split": f"{sizes} pairs",
                "notes": data.notes,
            },
        }

    def _write(
        self, head: RewardHead | PalHead, facts: dict[str, Any], report: dict[str, Any]
    ) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.folder.with_name(f".{self.folder.name}.new")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_head(head, temporary)
        for name, values in ((FILE, facts), (REPORT, report)):
            write_atomically(temporary / name, (json.dumps(values, indent=2) + "\n").encode())
        draw_calibration(report, temporary / "calibration.png")
        write_atomically(temporary / "README.md", card(facts, report).encode())
        if self.folder.exists():
            shutil.rmtree(self.folder)
        temporary.rename(self.folder)


def _write_head(head: RewardHead | PalHead, folder: Path) -> None:
    state = {name: value.detach().float().contiguous() for name, value in head.state_dict().items()}
    save_tensors(state, folder / WEIGHTS)


def add_user(folder: str | Path, name: str, judgements: Any, penalty: float = 1.0) -> None:
    """Fit a new user of a PAL reward to a few of their pairs. Nothing else changes.

    Args:
        folder (`str` or `Path`): A reward with users.
        name (`str`): Name of the new user, for `load_scorer(folder, user=name)`.
        judgements: The user's pairs, see `read_judgements`.
        penalty (`float`, *optional*, defaults to `1.0`): Pull towards the known users
            who would judge the pairs in the same way.

    Raises:
        UserError: The reward has no users, or the name is taken.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    if facts["head"]["kind"] != "pal":
        raise UserError(f"{folder} is a reward without users; train one with reward.head: pal")
    if name in facts["head"]["users"]:
        raise UserError(f"{folder} has a user {name!r} already; choose another name")
    reward = TrainedReward(folder)
    data = read_judgements(judgements)
    features = embed(reward.base, data, None)
    head = reward.head
    assert isinstance(head, PalHead)
    head = head.double()
    with torch.no_grad():
        images = [features.image[torch.from_numpy(rows)] for rows in (data.first, data.second)]
        text = features.text[torch.from_numpy(data.prompt)]
        margins = head.prototype_scores(images[0], text) - head.prototype_scores(images[1], text)
    decided = torch.from_numpy(data.label) != 0.5
    labels = torch.from_numpy(np.where(data.label > 0.5, 1.0, -1.0))
    margins, labels = reward.temperature * margins[decided], labels[decided]
    # A few pairs fix little, so the new user is first taken to be like a known one.
    start = likely_user(margins, labels, head.logits.detach())
    logits = fit_user(margins, labels, penalty, start)
    facts["head"]["users"].append(name)
    wider = build_head(facts["head"])
    state = {key: value.float() for key, value in head.state_dict().items()}
    state["logits"] = torch.cat([state["logits"], logits[None].float()])
    wider.load_state_dict(state)
    _write_head(wider, folder)
    write_atomically(folder / FILE, (json.dumps(facts, indent=2) + "\n").encode())
