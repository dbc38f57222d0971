"""The *Blind vote* tab: two images without the names of their models.

Every vote is on disk before the next pair comes.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import uuid
from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import UserError
from ..evaluation.formatting import rate
from .answers import ANNOTATOR_CHARS, Pending
from .doubt import Doubt
from .engine import Engine, enlarged
from .ui import Session, explained, export_button
from .votes import Pair, RoundVotes, VoteStore

KEYS = """
<script>
document.addEventListener("keydown", (event) => {
  const at = document.activeElement;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (at && (["INPUT", "TEXTAREA", "SELECT"].includes(at.tagName) || at.isContentEditable)) return;
  const names = {
    "1": ["vote-left"], "ArrowLeft": ["vote-left"],
    "2": ["vote-right"], "ArrowRight": ["vote-right"],
    "0": ["vote-tie"], "ArrowDown": ["vote-tie", "like-down"],
    "+": ["like-up"], "ArrowUp": ["like-up"], "-": ["like-down"]
  }[event.key] || [];
  for (const name of names) {
    const button = document.getElementById(name);
    if (button && button.offsetParent !== null && !button.disabled) {
      event.preventDefault();
      button.click();
    }
  }
});
</script>
"""


LEAST_PAIRS, MOST_PAIRS = 4, 16
"""How many votes make a visitor's taste."""
SEEDS = 2
"""Images of a prompt and model where a reward chooses among their pairs."""


class Voting:
    """Give visitors pairs to vote on, and take their votes.

    The pairs are drawn with two models for random prompts, or come from a round that
    waits for votes.

    Args:
        engine (`Engine`): Draws.
        store (`VoteStore`): Stores the votes. A `RoundVotes` also gives the pairs.
        prompts (`Sequence[str]`): Prompts to draw.
        pair (`tuple[str, str]`): Names of the two models, the base first.
        doubt (`Doubt`, *optional*): Chooses among several pairs. None takes any.

    Raises:
        UserError: There is nothing to vote on.
    """

    def __init__(
        self,
        engine: Engine,
        store: VoteStore,
        prompts: Sequence[str],
        pair: tuple[str, str],
        doubt: Doubt | None = None,
    ) -> None:
        self.engine, self.store, self.prompts, self.models = engine, store, list(prompts), pair
        self.doubt = doubt
        self.pending = Pending()
        # By session: prompt, chosen and rejected picture of the store.
        self._decided: dict[str, list[tuple[str, str, str]]] = {}
        self._lock = threading.Lock()
        if not self.prompts and not self.from_round:
            raise UserError(
                "--prompts: the list is empty; name a prompt set or a file with a prompt per line"
            )

    @property
    def from_round(self) -> bool:
        """Whether the pairs come from a round that waits for votes."""
        return isinstance(self.store, RoundVotes)

    def new_pair(self, visitor: str, annotator: object) -> Pair | None:
        """Return a visitor's next pair, and remember it until its vote.

        Args:
            visitor (`str`): Who asks.
            annotator: The name that the visitor gave.

        Returns:
            `Pair`, or None when there is none left.
        """
        pairs = self._candidates(annotator)
        if pairs and self.doubt is not None:
            pairs = [self.doubt.choose(pairs)]
        pair = pairs[0] if pairs else None
        self.pending.put(visitor, pair)
        return pair

    def _candidates(self, annotator: object) -> list[Pair]:
        """Return one pair, or those among which a reward chooses."""
        if isinstance(self.store, RoundVotes):
            count = 1 if self.doubt is None else self.doubt.candidates
            return self.store.candidates(annotator, random.Random(), count)
        if self.doubt is None:
            return self._drawn(1)
        prompts = math.ceil(self.doubt.candidates / SEEDS**2)
        return [pair for _ in range(prompts) for pair in self._drawn(SEEDS)]

    def _drawn(self, seeds: int) -> list[Pair]:
        """Draw a random prompt with both models. Returns all pairs of their images."""
        rng = random.SystemRandom()
        prompt, base = rng.choice(self.prompts), self.engine.defaults(self.models[0])
        drawn: dict[str, list[tuple[int, Image.Image]]] = {name: [] for name in self.models}
        for seed in rng.sample(range(self.engine.limits.seed), seeds):
            image_request = self.engine.read(
                prompt[: self.engine.limits.prompt_chars],
                seed,
                base["num_inference_steps"],
                base["guidance_scale"],
            )
            # Either model may be drawn first, so that time tells nothing.
            for name in rng.sample(self.models, 2):
                drawn[name].append((seed, self.engine.draw(name, image_request)))
        pairs, weights = [], self._weights()
        for two in itertools.product(*drawn.values()):
            sides = list(zip(self.models, two, strict=True))
            rng.shuffle(sides)
            (left, (left_seed, left_image)), (right, (right_seed, right_image)) = sides
            other_seed = {} if left_seed == right_seed else {"right_seed": right_seed}
            facts = {"seed": left_seed, **other_seed, **image_request.settings, "models": weights}
            pairs.append(
                Pair(
                    uuid.uuid4().hex,
                    image_request.prompt,
                    (left_image, right_image),
                    (left, right),
                    facts,
                )
            )
        return pairs

    def _weights(self) -> dict[str, str]:
        """Return the fingerprints of both models by their names."""
        return {name: self.engine.fingerprint(name) for name in self.models}

    def vote(self, visitor: str, shown: object, choice: str, annotator: object) -> bool:
        """Take a vote on the pair that the visitor sees.

        Args:
            visitor (`str`): Who votes.
            shown: Id of the pair.
            choice (`str`): `left`, `right` or `tie`.
            annotator: The name that the visitor gave.

        Returns:
            `bool`: False if the vote was for another pair (a key pressed twice).

        Raises:
            UserError: There is no such choice.
        """
        pair = self.pending.take(visitor, shown)
        if pair is None or not self.store.add(pair, choice, annotator):
            return False
        if choice in ("left", "right") and self.engine.users is not None and not self.from_round:
            other = "right" if choice == "left" else "left"
            vote = next(v for v in reversed(self.store.votes) if v["id"] == pair.id)
            names = vote[f"{choice}_image"], vote[f"{other}_image"]
            with self._lock:
                decided = self._decided.setdefault(visitor, [])
                decided.append((pair.prompt, *names))
                del decided[:-MOST_PAIRS]
                while len(self._decided) > 1000:  # forget visitors who left
                    self._decided.pop(next(iter(self._decided)))
        return True

    def personal(self, visitor: str) -> tuple[str, Image.Image, Image.Image, str]:
        """Draw a prompt for a visitor's own taste, as their votes show it.

        Args:
            visitor (`str`): Who asks.

        Returns:
            `tuple`: The prompt, an image without a user, one for the visitor from the
            same noise, and a description of the visitor's taste.

        Raises:
            UserError: The visitor has not voted often enough.
        """
        with self._lock:
            decided = list(self._decided.get(visitor, []))
        pairs = []
        for text, *names in decided:
            chosen, rejected = (self.store.picture(name) for name in names)
            if chosen is not None and rejected is not None:
                pairs.append((text, chosen, rejected))
        if len(pairs) < LEAST_PAIRS:
            missing = LEAST_PAIRS - len(pairs)
            raise UserError(f"vote on {missing} more pairs first; ties do not count")
        user = self.engine.learn_user(pairs)
        rng, name = random.SystemRandom(), self.engine.names[0]
        settings = self.engine.defaults(name)
        request = self.engine.read(
            rng.choice(self.prompts)[: self.engine.limits.prompt_chars],
            rng.randrange(self.engine.limits.seed),
            settings["num_inference_steps"],
            settings["guidance_scale"],
        )
        plain, own = self.engine.draw(name, request), self.engine.draw(name, request, user=user)
        like = f"From {len(pairs)} votes."
        if isinstance(user, dict):  # without names, which are those of other people
            like = (
                f"From {len(pairs)} votes: most like one of {len(user)} known users "
                f"({max(user.values()):.0%})."
            )
        return request.prompt, plain, own, like

    def state(self) -> str:
        """Return one line about all votes."""
        if self.from_round:
            votes = (
                f"{len(self.store.votes)} votes in this round; go on training with "
                "`--train.resume_from_checkpoint latest`."
            )
            return votes + self.store.remarks()
        count, win_rate = self.store.rate(*self.models, weights=self._weights())
        others = self.store.rate(*self.models)[0] - count
        note = f" {others} votes are on other weights of these names." if others else ""
        if not count:
            return f"No votes yet.{note}{self.store.remarks()}"
        return (
            f"{count} votes: **{self.models[1]}** wins {rate(win_rate)} % against "
            f"{self.models[0]}.{note}{self.store.remarks()}"
        )


def build(voting: Voting, session: Session, export: bool) -> None:
    """Add the tab's components and events to the page.

    Args:
        voting (`Voting`): Gives pairs and takes votes.
        session (`Session`): Knows the visitors.
        export (`bool`): Let visitors download all votes as a preference dataset.
    """
    gr.Markdown(
        "Which image follows the prompt better? Keys: **1** or ← left, **2** or → right, **0** "
        "or ↓ tie."
    )
    with gr.Row():
        annotator = gr.Textbox(
            label="Your name or a pseudonym (optional)",
            max_length=ANNOTATOR_CHARS,
            elem_id="vote-annotator",
            min_width=200,
        )
        start = gr.Button("Show a pair", variant="primary", elem_id="vote-start")
    prompt = gr.Textbox(label="Prompt", interactive=False, elem_id="vote-prompt")
    shown = gr.Textbox(visible="hidden", elem_id="vote-pair")
    with gr.Row():
        images = [
            gr.Image(
                label=side,
                format="png",
                interactive=False,
                buttons=[],
                elem_id=f"vote-image-{side}",
                min_width=150,
            )
            for side in ("left", "right")
        ]
    with gr.Row():
        buttons = [
            gr.Button(text, elem_id=f"vote-{choice}", interactive=False, min_width=90)
            for text, choice in (("Left (1)", "left"), ("Tie (0)", "tie"), ("Right (2)", "right"))
        ]
    status = gr.Markdown(voting.state, elem_id="vote-status")
    outputs = [prompt, shown, *images, *buttons, status]
    options: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": 1}

    def show(annotator: object, request: gr.Request) -> list[Any]:
        with explained():
            pair = voting.new_pair(session.visitor(request), annotator)
        if pair is None:
            return [
                "",
                "",
                None,
                None,
                *[gr.update(interactive=False)] * 3,
                "You have judged every pair of this round. " + voting.state(),
            ]
        return [
            pair.prompt,
            pair.id,
            *(enlarged(i) for i in pair.images),
            *[gr.update(interactive=True)] * 3,
            voting.state(),
        ]

    def show_next(annotator: object, request: gr.Request) -> list[Any]:
        if session.visitor(request) in voting.pending:
            # The vote was for another pair. This one still waits for its own.
            return [*[gr.skip()] * 4, *[gr.update(interactive=True)] * 3, gr.skip()]
        return show(annotator, request)

    def lock() -> list[Any]:
        return [gr.update(interactive=False)] * 3

    start.click(show, annotator, outputs, api_name="pair", **options)
    for button, choice in zip(buttons, ("left", "tie", "right"), strict=True):

        def take(
            shown: object, annotator: object, request: gr.Request, choice: str = choice
        ) -> list[Any]:
            with explained():
                voting.vote(session.visitor(request), shown, choice, annotator)
            return [*lock(), voting.state()]

        # The vote itself skips the queue of drawings, in which the next pair waits.
        button.click(
            take, [shown, annotator], [*buttons, status], queue=False, api_name=f"vote_{choice}"
        ).then(show_next, annotator, outputs, api_visibility="private", **options)
    if voting.engine.users is not None and not voting.from_round:
        _build_personal(voting, session, options)
    if export and not voting.from_round:
        export_button(
            voting.store.export,
            "Make a preference dataset of all votes",
            "votes",
            elem_id="vote",
            api_name="export",
        )


def _build_personal(voting: Voting, session: Session, options: dict[str, Any]) -> None:
    """Add the button that draws for the visitor's own taste."""
    draw = gr.Button(f"Draw for my taste (after {LEAST_PAIRS} votes)", elem_id="vote-personal")
    prompt = gr.Textbox(
        label="Prompt", interactive=False, elem_id="vote-personal-prompt", visible=False
    )
    with gr.Row():
        images = [
            gr.Image(
                label=label,
                format="png",
                interactive=False,
                buttons=[],
                elem_id=f"vote-personal-{name}",
                min_width=150,
                visible=False,
            )
            for name, label in (("plain", "without a user"), ("own", "for you"))
        ]
    like = gr.Markdown(elem_id="vote-personal-like")

    def show(request: gr.Request) -> list[Any]:
        with explained():
            text, *pictures, words = voting.personal(session.visitor(request))
        shown = [gr.update(value=enlarged(picture), visible=True) for picture in pictures]
        return [gr.update(value=text, visible=True), *shown, words]

    draw.click(show, None, [prompt, *images, like], api_name="personal", **options)
