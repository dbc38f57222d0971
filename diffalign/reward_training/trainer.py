"""Train a reward, and add a user to one."""

from __future__ import annotations

import dataclasses
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, UserError
from ..rewards.learned.heads import FactorHead, RewardHead, UserHead
from ..rewards.learned.pal import fit_new_user
from ..rewards.learned.tower_weights import TOWERS, lora_facts, trained_state
from ..rewards.registry import find_class, load_scorer
from ..rewards.scorers.clip import ClipScorer
from ..rewards.scorers.trained import (
    COVARIANCE,
    EVERYBODY,
    FILE,
    FORMAT,
    WEIGHTS,
    TrainedReward,
    base_fingerprint,
    build_head,
    check_name,
    read_facts,
    write_facts,
)
from ..runtime.distributed import end_training
from ..runtime.files import LOCK, check_replaceable, replacing_folder, save_tensors
from ..runtime.versions import versions
from ..training.arguments import read_callbacks
from ..training.sections import LoraSection
from ..training.tracking import check_tracker
from ..training.trained_weights import REWARD_RUN
from .captions import CaptionData
from .categories import pair_categories
from .config import RewardConfig
from .features import Features, check_base, embed, pair_nuisances
from .fit_head import fit_head, margins_of, member_means, weight_covariance
from .fit_linear_pal import fit_linear_pal
from .fit_pal import fit_pal, mean_user_scores, pal_margins, user_scales
from .item_losses import check_opinions
from .judgements import (
    Judgements,
    check_held_out,
    connected,
    read_judgements,
    read_options,
    split,
)
from .label_strength import check_labels, strengthen
from .pair_loss import fit_temperature, margins_of_scores, scale_of
from .pair_tensors import Pairs, make_items, make_pairs
from .report import accuracy, measure, write_report
from .tower_network import check_trainable
from .tower_run import TowerRun

if TYPE_CHECKING:
    from peft import LoraConfig


class RewardTrainer:
    """Trains a reward on judgements: a head over a CLIP scorer, or its towers too.

    Args:
        model (`str` or scorer): The base: a CLIP scorer or its name, or `imagereward`.
            The towers of a scorer are trained in place.
        args (`RewardConfig`, *optional*): The settings.
        train_dataset (*optional*): Anything that `load_preferences` reads (pairs,
            ranked lists, likes and dislikes), or a folder of the demo's votes.
        eval_dataset (*optional*): The same, for the report. None holds out prompts of
            `train_dataset`.
        model_path (`str`, *optional*): Weights of the base. None takes the published.
        columns (`dict`, *optional*): See `load_preferences`.
        peft_config (`LoraConfig`, *optional*): The LoRA of `towers: lora`. None takes
            rank 16 on the attention projections (on open_clip's feed-forward layers).
        callbacks (`Sequence[TrainerCallback]`, *optional*): Called
            while towers are trained.
        anchor_dataset (*optional*): Captioned images for `anchor`, in place of
            `anchor_data`.
        like_threshold (`float`, *optional*): Ratings from here on are likes. None
            reads ratings as they are.

    Attributes:
        interrupted_by (`int`, *optional*): Signal that ended the training early.

    Raises:
        ConfigError, UserError: The base, the settings or the data cannot be used.

    Example:
        ```python
        from diffalign import RewardConfig, RewardTrainer, load_scorer

        trainer = RewardTrainer(
            model="shapes-clip",  # or another CLIP scorer, or imagereward
            args=RewardConfig(output_dir="rewards/mine"),
            train_dataset="diffalign-quickstart/dataset",  # or a folder of votes
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
        peft_config: LoraConfig | None = None,
        callbacks: Any = None,
        anchor_dataset: Any = None,
        like_threshold: float | None = None,
    ) -> None:
        self.args = args or RewardConfig()
        check_tracker(self.args.report_to)
        self.callbacks = read_callbacks(callbacks)
        self.interrupted_by: int | None = None
        self.peft_config = self._lora(peft_config)
        self.folder = Path(self.args.output_dir)
        self._check_folder()
        if train_dataset is None:
            raise ConfigError("data", "no judgements: name a dataset or a folder of votes")
        # Without a threshold the ratings themselves are read.
        self.reading = {"columns": columns, "like_threshold": like_threshold}
        options = read_options(self.reading)
        self.judgements = data = read_judgements(train_dataset, **options)
        test = self.args.test if eval_dataset is None else 0.0
        self.parts = split(data, self.args.val, test, self.args.split_seed)
        if self.args.subsample < 1:
            drawn = self.parts["train"].drawn_prompts(self.args.subsample, self.args.seed)
            self.parts["train"] = drawn
        self._treat_ties()
        if self.args.label_strength:
            part = self.parts["train"]
            check_labels(torch.from_numpy(part.label), self.groups[torch.from_numpy(part.prompt)])
        if self.args.loss != "pairs":
            check_opinions(self.args.loss, self.parts["train"].opinions)
        self.eval_fingerprint: str | None = None
        if eval_dataset is None:
            self.held_out = self.parts["test"]
        else:
            self.held_out = read_judgements(eval_dataset, **options)
            self.eval_fingerprint = self.held_out.fingerprint()
            check_held_out(self.held_out, data)
        if self.args.head == "pal":
            self._note_nameless()
        if eval_dataset is not None:
            self._number_users()
        if self.args.head == "pal":
            self._check_users()
        self.base_name = model if isinstance(model, str) else model.spec.key
        if model_path is not None and Path(model_path).exists():
            model_path = str(Path(model_path).resolve())  # the reward may be used elsewhere
        self.model_path = model_path
        check_name(self.base_name, "model")
        self.base: Any = model
        if isinstance(model, str):
            if self.args.towers == "frozen":  # before weights are read
                check_base(find_class(model)[0], self.args.head)
            # Several processes choose their devices later.
            device = None if self.args.towers == "frozen" else "cpu"
            self.base = load_scorer(model, model=model_path, device=device)
        if self.args.towers == "frozen":
            check_base(self.base, self.args.head)
        else:
            check_trainable(self.base)
        if self.callbacks and self.args.towers == "frozen":
            raise ConfigError("callbacks", "are called while towers are trained; leave them out")
        self.captions = self._read_captions(anchor_dataset)
        self._check_again(model)

    @cached_property
    def groups(self) -> Tensor:
        """Group of every prompt, (prompts,), by the training pairs. See `connected`."""
        return torch.from_numpy(connected(self.parts["train"]))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the base. It reads all of its weights."""
        return base_fingerprint(self.base)

    def _read_captions(self, anchor_dataset: Any) -> CaptionData | None:
        """Read the captioned images of the anchor, None without any."""
        args = self.args
        captions = anchor_dataset if anchor_dataset is not None else args.anchor_data
        if not args.anchor:
            if captions is not None:
                raise ConfigError("anchor_dataset", "has no effect without anchor; set anchor=0.3")
            return None
        if not isinstance(self.base, ClipScorer):
            raise ConfigError(
                "anchor", f"{self.base_name} has no embeddings of prompts; set it to 0"
            )
        if captions is not None:
            return CaptionData(captions, self.base, args.anchor_batch_size, args.seed)
        if args.per_device_train_batch_size < 2:
            raise ConfigError(
                "anchor",
                "contrasts the prompts of a batch; set per_device_train_batch_size to 2 or more, "
                "or give anchor_data",
            )
        return None

    def _lora(self, peft_config: LoraConfig | None) -> LoraConfig | None:
        towers = self.args.towers
        if peft_config is not None and towers != "lora":
            raise ConfigError("lora", f"towers is {towers}; set towers: lora, or leave lora out")
        if towers == "lora" and peft_config is None:
            return LoraSection().to_peft()
        return peft_config

    def _note_nameless(self) -> None:
        """Say how much of the report is about nobody's taste in particular."""
        count = int((self.held_out.user < 0).sum())
        if count:
            self.judgements.notes.append(
                f"WARNING: {count} of {len(self.held_out)} judgements of the evaluation name no "
                "person, and are measured as the mean user"
            )

    def _number_users(self) -> None:
        """Number users as the training data does."""
        held, data = self.held_out, self.judgements
        numbers = {name: number for number, name in enumerate(data.users)}
        table = np.array([*(numbers.get(name, -1) for name in held.users), -1])
        unknown = [name for name in held.users if name not in numbers]
        if unknown and self.args.head == "pal":
            listed = f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}"
            if len(unknown) == len(held.users):
                raise ConfigError(
                    "eval_data",
                    f"none of its people ({listed}) is in the training data "
                    f"({', '.join(data.users[:5])}); write their names alike",
                )
            count = int(np.isin(held.user, [held.users.index(name) for name in unknown]).sum())
            data.notes.append(
                f"WARNING: {count} judgements of the evaluation are of people who did not train "
                f"({listed}), and are measured as the mean user"
            )
        held.user, held.users = table[held.user], data.users

    def _check_again(self, model: Any) -> None:
        """Check that the folder will find the same base."""
        if isinstance(model, str):
            return
        again: Any = load_scorer(self.base_name, model=self.model_path, device="cpu")
        if base_fingerprint(again) != self.fingerprint:
            raise ConfigError(
                "model",
                f"{self.base_name} would be loaded with other weights or options than these; give "
                "the base by its name, and its weights as model_path",
            )

    def _check_folder(self) -> None:
        if not self.folder.name:
            raise ConfigError(
                "train.output_dir",
                f"{self.args.output_dir!r} has no name; name a folder such as rewards/mine",
            )
        if self.args.cache is not None:
            cache = Path(self.args.cache).resolve()
            if self.folder.resolve() in (cache, *cache.parents):
                raise ConfigError(
                    "train.cache",
                    f"{self.args.cache!r} lies in train.output_dir, which is replaced as a whole; "
                    "choose a folder outside",
                )
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        if self.args.towers != "frozen":
            # `begin` refuses other runs. Any other file here is an error.
            if not any((self.folder / name).exists() for name in (FILE, REWARD_RUN, "logs", LOCK)):
                raise self._foreign_folder()
            return
        if not self.args.overwrite_output_dir:
            raise UserError(
                f"train.output_dir: {str(self.folder)!r} is not empty; choose another folder, or "
                "set train.overwrite_output_dir: true"
            )
        if not (self.folder / FILE).is_file():
            raise self._foreign_folder()

    def _foreign_folder(self) -> UserError:
        return UserError(
            f"train.output_dir: {str(self.folder)!r} holds something other than a reward; choose "
            "another folder"
        )

    def _treat_ties(self) -> None:
        """Leave out ties that are not trained on."""
        if self.args.ties == "rao_kupper" and not (self.parts["train"].label == 0.5).any():
            raise UserError(
                "train.ties: rao_kupper learns from pairs that were judged equal, and the training "
                "prompts have none; set it to half"
            )
        if self.args.ties == "drop":
            for name in ("train", "val"):
                self.parts[name] = self.parts[name].without_ties()

    def _check_users(self) -> None:
        train = self.parts["train"]
        users = train.user[(train.user >= 0) & (train.label != 0.5)]
        if not len(users):
            raise UserError("train.head: pal needs a column user_id (or votes with names)")
        if EVERYBODY in self.judgements.users:
            raise UserError(f"train.head: no user can be named {EVERYBODY!r}")
        counts = np.bincount(users, minlength=len(self.judgements.users))
        few = [name for name, n in zip(self.judgements.users, counts, strict=True) if n < 2]
        if few:
            raise UserError(
                f"train.head: {len(few)} users have fewer than two decided judgements on the "
                f"training prompts, such as {few[0]!r}; pal needs at least two of each (add_user "
                "fits a new user to a finished reward)"
            )

    def train(self) -> Path:
        """Train, measure and write the folder.

        Returns:
            `Path`: The folder, for `load_scorer`. After a signal (see
            `interrupted_by`) it holds a checkpoint and no reward yet.
        """
        if self.args.towers != "frozen":
            return self._train_towers()
        args = self.args
        cache = Path(args.cache) if args.cache else None
        features = embed(self.base, self.judgements, cache)
        train, val = (self._pairs(self.parts[name], features) for name in ("train", "val"))
        counts: dict[str, float] = {}
        if args.label_strength:
            train, counts = strengthen(train, val, self.groups, args)
        head: RewardHead | UserHead
        if args.head == "pal":
            head, chosen = self._fit_users(train, val)
        else:
            items = None
            if args.loss != "pairs":
                opinions = self.parts["train"].opinions
                items = make_items(opinions, features, self._score, args.prompt_weights)
            head, chosen = fit_head(train, val, args, items, self.groups)
        if self.held_out is self.parts.get("test"):
            test = self._pairs(self.held_out, features)
        else:
            test = self._pairs(self.held_out, embed(self.base, self.held_out, cache))
        with torch.no_grad():
            unscaled = self._margins(head, val)
        temperature = fit_temperature(unscaled, val, args)
        with torch.no_grad():
            margins = temperature * self._margins(head, test)
            leads = test.base[:, 0] - test.base[:, 1]
            if isinstance(head, UserHead):  # without a name the mean user scores
                plain = mean_user_scores(head, train)
            else:
                plain = member_means(head, train)
            affine = scale_of(plain, temperature)
        report = measure(
            margins,
            leads,
            test.label,
            test.prompt,
            test.user,
            self.held_out.users,
            test.nuisances,
            pair_categories(self.held_out),
            args.flip_rate,
        )
        if isinstance(head, UserHead):
            with torch.no_grad():
                by_mean_user = margins_of_scores(mean_user_scores(head, test))
            report["mean_user"] = accuracy(by_mean_user, test.label, test.prompt)
        described = self._described(head, train.first.shape[1])
        facts = self._facts(described, temperature, chosen | counts)
        facts["affine"] = affine
        if isinstance(head, UserHead):
            facts["affine_of_users"] = user_scales(head, train, self.judgements.users, temperature)
        covariance = None
        if isinstance(head, RewardHead):
            covariance = weight_covariance(head, train, args, chosen["l2"])
        self._write(head, facts, report, covariance)
        return self.folder

    def _train_towers(self) -> Path:
        args, lora = self.args, self.peft_config
        parts = self.parts["train"], self.parts["val"], self.held_out
        noise = {name: getattr(args, name) for name in ("flip_rate", "smoothing", "margin")}
        noise = {name: value for name, value in noise.items() if value}
        identity = {
            "method": f"reward, {args.towers} towers",
            "model": self.fingerprint,
            "dataset": self.judgements.fingerprint(),
            "lora": None if lora is None else str(lora_facts(lora)),
            "precision": args.mixed_precision,
            "seed": args.seed,
            **({} if args.ties == "half" else {"ties": args.ties}),
            **({"labels": noise} if noise else {}),
            **({} if args.prompt_weights else {"prompt_weights": False}),
            **({} if args.subsample == 1 else {"subsample": args.subsample}),
            "split": [args.val, args.test, args.split_seed, self.eval_fingerprint],
            "anchor": [
                args.anchor,
                None if self.captions is None else self.captions.data.fingerprint,
            ],
        }
        run = TowerRun(self.base, args, *parts, lora, identity, self.callbacks, self.captions)

        def finish() -> None:
            scores = {name: run.scores(name) for name in ("val", "test")}
            if run.accelerator.is_main_process:
                self._finish_towers(run, scores)
            run.accelerator.wait_for_everyone()

        self.interrupted_by = run.train(finish).interrupted_by
        end_training(run.accelerator)
        return self.folder

    def _finish_towers(self, run: TowerRun, scores: dict[str, Tensor]) -> None:
        """Measure the trained towers and write them."""
        val, test = (run.data[name].labels for name in ("val", "test"))
        margins = {name: margins_of_scores(values) for name, values in scores.items()}
        temperature = fit_temperature(margins["val"], val, self.args)
        report = measure(
            temperature * margins["test"],
            margins_of_scores(run.base_scores["test"]),
            test.label,
            test.prompt,
            test.user,
            self.held_out.users,
            pair_nuisances(run.data["test"].part),
            pair_categories(run.data["test"].part),
            self.args.flip_rate,
        )
        chosen = {"validation_loss": run.best.loss, "step": float(run.best.step)}
        facts = self._facts({"kind": "factor"}, temperature, chosen)
        facts["affine"] = scale_of(scores["val"], temperature)
        facts["towers"] = {"kind": self.args.towers}
        if run.network.lora is not None:
            facts["towers"]["lora"] = lora_facts(run.network.lora)
        save_tensors(trained_state(run.network.towers), self.folder / TOWERS)
        _write_head(run.network.head, self.folder)
        write_report(self.folder, report, facts)
        # Last, because it makes the folder a reward.
        write_facts(self.folder, facts)

    def _fit_users(self, train: Pairs, val: Pairs) -> tuple[UserHead, dict[str, float]]:
        """Fit a PAL head."""
        args, users = self.args, len(self.judgements.users)
        if args.pal_form != "linear":
            return fit_pal(train, val, users, args)
        head, chosen = fit_linear_pal(train, users, args, self.groups)
        if args.prototypes > 1 and not chosen["taste_gain"]:
            self.judgements.notes.append(
                f"WARNING: no tastes found among {users} people: reading them from their votes "
                "does not predict other votes better than one reward does, so all of them have one"
            )
        return head, chosen

    @torch.no_grad()
    def _score(self, image: Tensor, text: Tensor) -> Tensor:
        base: Any = self.base
        if not text.shape[1]:
            return base.joint_score(image.float().to(base.device)).cpu().double()
        rows = image.float().to(base.device), (text.float().to(base.device),)
        return base.similarity(*rows).cpu().double()

    def _pairs(self, part: Judgements, features: Features) -> Pairs:
        return make_pairs(part, features, self._score, self.args.prompt_weights)

    def _margins(self, head: RewardHead | UserHead, pairs: Pairs) -> Tensor:
        if isinstance(head, UserHead):
            return pal_margins(head, pairs)
        return margins_of(head, pairs).mean(1)

    def _described(self, head: RewardHead | UserHead, dim: int) -> dict[str, Any]:
        """Return what rebuilds the head."""
        args, data = self.args, self.judgements
        described: dict[str, Any] = {"kind": args.head, "dim": dim}
        if isinstance(head, UserHead):
            described |= {
                "users": data.users,
                "prototypes": args.prototypes,
                "hidden": args.user_hidden,
                "form": args.pal_form,
                # Users of the training alone: those who are added later change no mean.
                "population": head.logits.softmax(1).mean(0).tolist(),
                "trained_users": len(data.users),
            }
        else:
            described |= {"members": args.members, "hidden": args.hidden}
            described |= {"quantiles": True} if args.loss == "quantiles" else {}
            described |= {"joint": True} if hasattr(self.base, "joint_features") else {}
        return described

    def _facts(
        self, head: dict[str, Any], temperature: float, chosen: dict[str, float]
    ) -> dict[str, Any]:
        args, data = self.args, self.judgements
        sizes = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items())
        return {
            "format": FORMAT,
            "name": self.folder.resolve().name,
            "versions": versions(),
            "summary": f"a reward trained on {len(data):,} judgements, over {self.base.spec.key}",
            "base": {
                "scorer": self.base_name,
                "model": self.model_path,
                "fingerprint": self.fingerprint,
                "backbone": self.base.spec.backbone,
            },
            "head": head,
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
                "eval_fingerprint": self.eval_fingerprint,
                "reading": self.reading,
                "split": f"{sizes} pairs",
                "notes": data.notes,
            },
        }

    def _write(
        self,
        head: RewardHead | UserHead,
        facts: dict[str, Any],
        report: dict[str, Any],
        covariance: Tensor | None,
    ) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(self.folder) as temporary:
            _write_head(head, temporary)
            if covariance is not None:
                save_tensors(
                    {"covariance": covariance.float().contiguous()}, temporary / COVARIANCE
                )
            write_facts(temporary, facts)
            write_report(temporary, report, facts)


def _write_head(head: RewardHead | UserHead | FactorHead, folder: Path) -> None:
    state = {name: value.detach().float().contiguous() for name, value in head.state_dict().items()}
    save_tensors(state, folder / WEIGHTS)


def add_user(
    folder: str | Path,
    name: str,
    judgements: Any,
    penalty: float = 1.0,
    columns: dict[str, str] | None = None,
) -> None:
    """Fit a new user of a PAL reward to a few of their pairs. Nothing else changes.

    Args:
        folder (`str` or `Path`): A reward with users.
        name (`str`): Name of the new user, for `load_scorer(folder, user=name)`.
        judgements: The user's pairs, see `read_judgements`.
        penalty (`float`, *optional*, defaults to `1.0`): Pull towards the known users
            who would judge the pairs in the same way.
        columns (`dict`, *optional*): See `load_preferences`. None takes those that the
            reward was trained with.

    Raises:
        UserError: The reward has no users, the name is taken, or the judgements are of
            several people.
    """
    folder = Path(folder)
    check_replaceable(folder)
    facts = read_facts(folder)
    if facts["head"]["kind"] != "pal":
        raise UserError(f"{folder} is a reward without users; train one with train.head: pal")
    if name == EVERYBODY:
        raise UserError(f"no user can be named {EVERYBODY!r}")
    if name in facts["head"]["users"]:
        raise UserError(f"{folder} has a user {name!r} already; choose another name")
    reading = {"columns": None, "like_threshold": None} | (facts["data"].get("reading") or {})
    reading |= {"columns": columns} if columns else {}
    data = read_judgements(judgements, **read_options(reading))
    if name in data.users:
        data = data.rows(np.flatnonzero(data.user == data.users.index(name)))
    elif len(data.users) + bool((data.user < 0).any()) > 1:
        raise UserError(
            f"the judgements are of {len(data.users) + bool((data.user < 0).any())} people, and "
            f"none of them is {name!r}; give those of one person"
        )
    reward = TrainedReward(folder, device="cpu")
    features = embed(reward.base, data, None)
    head = reward.head
    assert isinstance(head, UserHead)
    head = head.double()
    with torch.no_grad():
        images = [features.image[torch.from_numpy(rows)] for rows in (data.first, data.second)]
        text = features.text[torch.from_numpy(data.prompt)]
    decided = torch.from_numpy(data.label) != 0.5
    share, weight = (torch.from_numpy(v)[decided] for v in (data.label, data.weight))
    weight = weight / weight.mean()
    # Votes for either image are pairs of their own.
    twice, ones = decided.nonzero()[:, 0].repeat(2), torch.ones_like(share)
    labels, weight = torch.cat([ones, -ones]), torch.cat([weight * share, weight * (1 - share)])
    margins = head.margins(images[0][twice], images[1][twice], text[twice], reward.temperature)
    logits = fit_new_user(margins, labels, head.logits.detach(), penalty, weight)
    facts["head"]["users"].append(name)
    if "affine_of_users" in facts:
        with torch.no_grad():
            shares = logits.softmax(0).to(text).expand(len(text), -1)
            scores = torch.stack([head.score(image, text, shares) for image in images], 1)
        facts["affine_of_users"][name] = scale_of(scores, reward.temperature)
    wider = build_head(facts["head"])
    state = {key: value.float() for key, value in head.state_dict().items()}
    state["logits"] = torch.cat([state["logits"], logits[None].float()])
    wider.load_state_dict(state)
    with replacing_folder(folder) as temporary:
        shutil.copytree(folder, temporary, symlinks=True, dirs_exist_ok=True)
        _write_head(wider, temporary)
        write_facts(temporary, facts)
