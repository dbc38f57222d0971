"""PPD: Dang et al. 2025, arXiv 2501.06655.

    z    = -(beta/2) [(m_w(c, u) - m_l(c, u)) - (r_w(c) - r_l(c))]
    loss = -log sigmoid(z)

Diffusion-DPO with a policy that also sees who judged the pair, u. The reference sees
the prompt alone. The network is frozen. A user adapter reads u: attention to user
tokens beside the network's own (`diffalign.backbones.user_adapter`). It starts as the
network itself, so the first loss is log 2.

By default users have learned embeddings, one per user of the data, as in Premier (arXiv
2603.20725). A new user is a mixture of known ones, weighted by how well each explains
the new user's pairs. The paper instead shows four pairs of a user to a vision-language
model and reads its hidden states: `user_embeddings` names such an embedder
(`diffalign.rewards.users`). Its pairs do not train, and it embeds new users alike.

With probability `user_dropout` a row has no user, so that the model without a user
stays usable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module

from ..backbones import Backbone
from ..backbones.user_adapter import WEIGHTS, UserAdapter
from ..config.ranges import Count, Positive, Share
from ..config.section import config_section
from ..data import PreferenceDataset
from ..data.groups import Group
from ..errors import ConfigError
from ..rewards.users import ExamplePair, UserEmbedder, embed_users, load_user_embedder
from ..runtime.distributed import reshard, sharded_modules, whole
from ..runtime.files import read_tensors
from ..training.batch import Batch
from ..training.build import DTYPES, load_plain_network
from ..training.denoiser import Forward
from ..training.loop import BatchSource
from ..training.reference import DropoutOff, Reference
from ..training.sharding import load_weights
from ..training.trained_weights import State, TrainedWeights
from .diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer

USER, USER_MASK = "user_index", "user_mask"


@config_section
class PPDConfig(DiffusionDPOConfig):
    """`train:` for `method: ppd`.

    Example:
        ```python
        from diffalign import PPDConfig

        args = PPDConfig(output_dir="runs/ppd", learning_rate=1e-4, user_tokens=4)
        assert args.user_dropout == 0.1
        ```
    """

    user_embeddings: str = "table"
    """table (learned) | clip_difference:SCORER | reward:FOLDER | transformers:MODEL |
    server:URL#MODEL, or a registered name. Source: ours; the paper has
    LLaVA-OneVision."""
    num_examples: Count = 4
    """Pairs of each user that an embedder is shown. They do not train. Source: paper,
    4."""
    user_tokens: Count = 4
    """Tokens of a user with `user_embeddings: table`, or of an embedder that gives one
    vector. Source: ours; not public."""
    user_dim: Count = 128
    """user_embeddings: table: size of a user token. Source: ours."""
    user_dropout: Share = 0.1
    """Share of rows that train without their user. Source: ours; not public."""
    user_scale: Positive[float] = 1.0
    """Factor of the attention to users. Source: IP-Adapter, 1."""
    validation_user: str | None = None
    """User whose images validations draw. null draws without a user, which is the base
    model. Source: ours."""


def opened(groups: list[Group]) -> list[ExamplePair]:
    """Decode the pairs of a user.

    Args:
        groups (`list[Group]`): Pairs of the dataset.
    """
    return [ExamplePair(group.prompts[0], *group.open_images()) for group in groups]


class UserAdapterWeights:
    """The user adapter of a network, in a file of its own.

    Args:
        network: The network with the adapter.
        adapter (`UserAdapter`): What trains.
        beta (`float`, *optional*): The run's beta, which is kept beside the weights.
        embeddings (`str`): Where the embeddings of users come from, kept there too.
    """

    description = "user adapter"

    def __init__(
        self, network: Module, adapter: UserAdapter, beta: float | None, embeddings: str
    ) -> None:
        self.network, self.adapter = network, adapter
        self.beta, self.embeddings = beta, embeddings

    def gather(self, accelerator: Accelerator, prepared: Module) -> State:
        """See `TrainedWeights.gather`."""
        reshard(self.network)
        state = self.adapter.state_dict()
        return {name: whole(value.detach()).cpu().contiguous() for name, value in state.items()}

    def write(self, folder: Path, state: State) -> None:
        """See `TrainedWeights.write`."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"method": "ppd", "beta": self.beta, "user_embeddings": self.embeddings}
        self.adapter.write(folder, state, facts)

    def write_checkpoint(self, folder: Path, state: State) -> None:
        """See `TrainedWeights.write_checkpoint`."""
        self.write(folder, state)

    def read_checkpoint(self, folder: Path) -> None:
        """See `TrainedWeights.read_checkpoint`."""
        tensors, _ = read_tensors(folder / WEIGHTS)
        if sharded_modules(self.network):
            reshard(self.network)
            load_weights(self.network, self.adapter.state_dict(), tensors)
        else:
            self.adapter.load_state_dict(tensors)


class UserFreeReference:
    """The frozen network without users.

    Args:
        network: The network with the adapter's hooks.
        adapter (`UserAdapter`): Its adapter.
    """

    description = "the network without users"

    def __init__(self, network: Module, adapter: UserAdapter) -> None:
        self.network, self.adapter = network, adapter
        self.dropout_off = DropoutOff(network)

    def start(self) -> None:
        """Do nothing. See `Reference.start`."""

    def predict(
        self, backbone: Backbone, noisy: Tensor, times: Tensor, condition: dict[str, Tensor]
    ) -> Tensor:
        """Run the network without users. See `Reference.predict`."""
        with torch.no_grad(), self.adapter.users(None), self.dropout_off():
            return backbone.predict(self.network, noisy, times, condition)


class PPDTrainer(DiffusionDPOTrainer):
    """Trains a user adapter on pairs that say who judged them.

    Example:
        ```python
        from PIL import Image

        from diffalign import PPDConfig, PPDTrainer

        red, blue = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
        row = {"prompt": "a small circle on the left of a gray background"}
        rows = [
            row | {"chosen": red, "rejected": blue, "user_id": "ann"},
            row | {"chosen": blue, "rejected": red, "user_id": "bob"},
        ]
        args = PPDConfig(output_dir="runs/ppd", max_steps=2)
        trainer = PPDTrainer(model="shapes", args=args, train_dataset=rows)
        trainer.train()
        assert trainer.adapter.user_names == ["ann", "bob"]
        ```
    """

    method = "ppd"
    _name = "PPD"
    _tag_names = ("ppd",)
    _paper: ClassVar[dict[str, str]] = {
        "title": "Personalized Preference Fine-tuning of Diffusion Models",
        "id": "2501.06655",
        "citation": """@inproceedings{dang2025personalized,
  title     = {Personalized Preference Fine-tuning of Diffusion Models},
  author    = {Dang, Meihua and Singh, Anikait and Zhou, Linqi and Ermon, Stefano and
               Song, Jiaming},
  booktitle = {CVPR},
  year      = {2025}
}""",
    }
    _not_public: ClassVar[str] = (
        "Code, beta, the dropout of users, the layer and pooling of the vision-language model, "
        "and the initialisation."
    )
    config_class = PPDConfig
    can_be_online = False
    args: PPDConfig
    adapter: UserAdapter
    """What trains."""
    user_names: list[str]
    """Users of the training data, sorted."""
    embedder: UserEmbedder | None = None
    """Makes the embeddings of users, unless they are learned."""
    examples: list[list[Group]]
    """Pairs of each user that the embedder is shown."""

    def read_dataset(self, source: Any, split: str) -> PreferenceDataset:
        """Read pairs that say who judged them.

        Raises:
            ConfigError: They do not, or they are a stream.
        """
        dataset = super().read_dataset(source, split)
        if not dataset.has_users:
            raise ConfigError(
                "data.columns",
                "PPD needs to know who judged a pair; add a column user_id, or map yours: "
                "data.columns: {user_id: ...}",
            )
        if dataset.row_ids is None:
            raise ConfigError(
                "data.dataset_streaming", "the users of a stream are not known; set it to false"
            )
        return dataset.using("user_id")

    def validate(self) -> None:
        """Refuse a LoRA, and list the users.

        Raises:
            ConfigError: There is a LoRA, an average as the reference, fewer than two
                users, or `validation_user` is unknown.
        """
        super().validate()
        args = self.args
        if self.peft_config is not None:
            raise ConfigError(
                "lora", "PPD trains a user adapter on the frozen network; leave the section out"
            )
        if args.reference_decay is not None:
            raise ConfigError(
                "train.reference_decay", "PPD's reference is the network without users; set null"
            )
        self.user_names = self.train_dataset.users()
        if len(self.user_names) < 2:
            raise ConfigError(
                "data.dataset_name",
                f"the pairs have {len(self.user_names)} users; PPD needs at least two",
            )
        if args.user_embeddings != "table":
            self.embedder = load_user_embedder(args.user_embeddings)
            self._set_examples_apart()
        self.notes.append(f"users: {len(self.user_names)}")
        user = args.validation_user
        if user is not None and user not in self.user_names:
            raise ConfigError(
                "train.validation_user",
                f"{user!r} is none of the {len(self.user_names)} users, such as "
                f"{self.user_names[0]!r}",
            )
        evaluated = [] if self.eval_dataset is None else self.eval_dataset.users()
        unknown = [name for name in evaluated if name not in self.user_names]
        if unknown:
            self.notes.append(
                f"users: {len(unknown)} of the evaluation data are not those of the training data, "
                f"such as {unknown[0]!r}; their pairs are evaluated without a user"
            )

    def _set_examples_apart(self) -> None:
        """Take the first pairs of each user for the embedder, train on the others."""
        wanted, dataset = self.args.num_examples, self.train_dataset
        places: dict[str, list[int]] = {}
        without: list[int] = []
        for place, user in enumerate(dataset.user_of_groups()):
            if user is None:
                without.append(place)
            else:
                places.setdefault(user, []).append(place)
        few = [user for user, rows in places.items() if len(rows) <= wanted]
        places = {user: rows for user, rows in places.items() if user not in few}
        if len(places) < 2:
            raise ConfigError(
                "train.num_examples",
                f"{len(places)} users have more than {wanted} pairs; lower it, or take "
                "user_embeddings: table",
            )
        if few:
            self.notes.append(
                f"users: {len(few)} left out because they have at most {wanted} pairs: "
                f"{', '.join(few[:5])}{', ...' if len(few) > 5 else ''}"
            )
        self.user_names, kept = sorted(places), list(without)
        self.examples = []
        for user in self.user_names:
            # A tie says nothing about a taste.
            shown = [place for place in places[user] if dataset[place].weight > 0][:wanted]
            self.examples.append([dataset[place] for place in shown])
            kept += [place for place in places[user] if place not in shown]
        self.train_dataset = dataset.select(sorted(kept))
        self.record.dataset = self.train_dataset

    def build_network(self) -> Module:
        """Load the network, frozen, and add a user adapter."""
        args = self.args
        network = load_plain_network(self.backbone, args, DTYPES[args.mixed_precision])
        network.requires_grad_(False)
        if self.embedder is None:
            self.adapter = UserAdapter(network, args.user_dim, args.user_tokens, self.user_names)
        else:
            # One user at a time: the decoded images of all may not fit the memory.
            rows = [embed_users(self.embedder, [opened(groups)]) for groups in self.examples]
            table = torch.cat(rows)
            self.embedder = None  # it may be a large model
            _, tokens, dim = table.shape
            expand = args.user_tokens if tokens == 1 else 1
            self.adapter = UserAdapter(network, dim, tokens, self.user_names, expand)
            assert self.adapter.table is not None
            self.adapter.table.data.copy_(table)
            self.adapter.table.requires_grad_(False)
        self.adapter.scale = args.user_scale
        self.adapter.to(self.accelerator.device)
        self.adapter.attach(network)
        network.add_module("user_adapter", self.adapter)
        return network.train()

    def build_trained_weights(self) -> TrainedWeights:
        """Build what saves the user adapter."""
        args = self.args
        return UserAdapterWeights(self.network, self.adapter, args.error_beta, args.user_embeddings)

    def build_reference(self) -> Reference | None:
        """Build the reference: the network without users, or another model."""
        if self.ref_backbone is not None:
            return super().build_reference()
        return UserFreeReference(self.network, self.adapter)

    def predictor(self, network: Module) -> Forward:
        """Return the function that runs a network for the users of a batch."""

        def predict(noisy: Tensor, times: Tensor, condition: dict[str, Tensor]) -> Tensor:
            users = self._users(condition)
            if torch.is_grad_enabled():
                # They stay for checkpointed activations, which run again in backward.
                self.adapter.set_users(*users)
                return self.backbone.predict(network, noisy, times, condition)
            with self.adapter.users(*users):
                return self.backbone.predict(network, noisy, times, condition)

        return predict

    def _users(self, condition: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        if USER not in condition or self.adapter.table is None:
            return None, None
        return self.adapter.table[condition[USER]], condition[USER_MASK]

    def prepare(self, batch: Batch) -> Batch:
        """Add the users of the rows.

        Args:
            batch (`Batch`): g pairs.

        Returns:
            `Batch`: Its condition also says who judged each image. Users that
            are not in the training data get no user tokens.
        """
        indices, kept = [], []
        for user, stream in zip(batch.users, batch.generators("ppd"), strict=True):
            known = user in self.user_names
            dropped = float(torch.rand(1, generator=stream)) < self.args.user_dropout
            # Evaluations run without gradients, and see every user.
            kept.append(known and not (dropped and torch.is_grad_enabled()))
            indices.append(self.user_names.index(user) if user is not None and known else 0)
        device = batch.x0.device
        index, mask = torch.tensor(indices, device=device), torch.tensor(kept, device=device)
        users = {
            USER: index.repeat_interleave(batch.k),
            USER_MASK: mask.float().repeat_interleave(batch.k),
        }
        return replace(batch, condition={**batch.condition, **users})

    def build_source(self) -> BatchSource:
        """Build the source of batches, and set the user of validation images."""
        self._set_validation_user()
        return super().build_source()

    def on_optimizer_step(self, step: int) -> None:
        """Leave the user whose images a validation may draw.

        See `Trainer.on_optimizer_step`.
        """
        super().on_optimizer_step(step)
        self._set_validation_user()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Give the averaged weights, which also project the user of a validation.

        See `Trainer.averaged_weights`.
        """
        try:
            with super().averaged_weights():
                self._set_validation_user()
                yield
        finally:
            self._set_validation_user()

    def _set_validation_user(self) -> None:
        user = self.args.validation_user
        with torch.no_grad():
            self.adapter.set_users(None if user is None else self.adapter.embedding(user)[None])
