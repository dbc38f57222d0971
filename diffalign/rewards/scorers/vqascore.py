"""VQAScore: Lin et al. 2024, arXiv 2404.01291, the probability of a "Yes".

A vision-language model is asked whether an image shows a text. The score is the
probability of the answer, over the whole vocabulary and not against "No". Any
image-text-to-text model of transformers will do. The authors' package, t2v_metrics 3.1,
asks the models of today in this way. Its numbers for CLIP-FlanT5, which transformers
does not have, are another definition.

The package reads the probability from `generate`, which applies a model's repetition
penalty if it has one. This reads it from the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError, one_line
from ...runtime.hashing import content_hash, text_hash
from ..base import Item, Scorer
from ..spec import ScorerSpec

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'


class VQAScore(Scorer):
    """Probability that a vision-language model answers "Yes".

    Args:
        model (`str` or path): Folder or Hub id of an image-text-to-text model, such as
            `Qwen/Qwen2.5-VL-7B-Instruct`.
        template (`str`, *optional*): Another question. `{prompt}` stands for the
            prompt.
        answer (`str`, defaults to "Yes"): The answer. Of one that has several tokens
            the geometric mean of their probabilities is taken.
        against (`str`, *optional*): An opposite answer, such as "No". The score is then
            P(answer) / (P(answer) + P(against)). None is the published score.
        **options: Options of every `Scorer`.

    Raises:
        ConfigError: There is no model, it cannot be loaded, or the question has no
            place for the prompt.
    """

    spec = ScorerSpec(
        key="vqascore",
        aliases=("vqa_score",),
        summary='probability that a vision-language model answers "Yes, the image shows this"',
        licence="of the model",
        requires=("image", "prompt"),
        range=(0.0, 1.0),
        affine=(0.0, 1.0),
        preprocess="of the model",
        text="template",
        citation="Lin et al. 2024, arXiv 2404.01291",
    )

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        template: str = QUESTION,
        answer: str = "Yes",
        against: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if model is None:
            raise ConfigError(
                "model",
                "expected the folder or the Hub id of a vision-language model, such as "
                "Qwen/Qwen2.5-VL-7B-Instruct",
            )
        if "{prompt}" not in template:
            raise ConfigError("template", "expected a text with {prompt} in it")
        import transformers

        self.model, self.template, self.answer, self.against = str(model), template, answer, against
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(self.model)
            if not getattr(self.processor, "chat_template", None):
                raise ValueError("it has no chat template, by which it could be asked")
            network: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                self.model, dtype=self.dtype
            )
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise ConfigError("model", f"{self.model!r} cannot be loaded ({reason})") from None
        self.network = network.requires_grad_(False).eval().to(self.device)
        self.answers = [self._tokens(text) for text in (answer, against) if text is not None]

    def _tokens(self, text: str) -> list[int]:
        tokens = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        if not tokens:
            raise ConfigError("answer", f"{text!r} is no text for this model")
        return list(tokens)

    def modules(self) -> Iterable[nn.Module]:
        return [self.network]

    def identity(self) -> dict[str, Any]:
        folder = Path(self.model)
        commit = getattr(self.network.config, "_commit_hash", None)
        return {
            "model": content_hash(folder) if folder.is_dir() else [self.model, commit],
            "question": text_hash(self.template),
            "answer": self.answer,
            "against": self.against,
        }

    def score_batch(self, items: list[Item]) -> list[float]:
        # One by one, as the package does: padding would change the last digits.
        return [self._score(item) for item in items]

    @torch.no_grad()
    def _score(self, item: Item) -> float:
        # Not str.format: a prompt may hold braces.
        question = self.template.replace("{prompt}", item.prompt)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(
            images=[item.image.convert("RGB")], text=[text], return_tensors="pt"
        ).to(self.device, self.dtype)
        probabilities = [self._probability(dict(inputs), tokens) for tokens in self.answers]
        if len(probabilities) == 1:
            return probabilities[0]
        return probabilities[0] / sum(probabilities)

    def _probability(self, inputs: dict[str, Any], answer: list[int]) -> float:
        """Geometric mean of the probabilities of an answer's tokens."""
        ids, count = inputs["input_ids"], len(answer)
        if count > 1:
            more = torch.tensor([answer[:-1]], device=ids.device)
            for name, filler in (("attention_mask", 1), ("mm_token_type_ids", 0)):
                if name in inputs:
                    added = torch.full_like(more, filler)
                    inputs[name] = torch.cat([inputs[name], added.to(inputs[name])], dim=1)
            inputs["input_ids"] = torch.cat([ids, more], dim=1)
        logits = self.network(**inputs).logits[0, -count:].float()
        log_probs = logits.log_softmax(-1)[torch.arange(count), torch.tensor(answer)]
        return float(log_probs.mean().exp())
