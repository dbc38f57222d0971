"""The model card of a finished run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.files import write_atomically
from ..runtime.versions import versions
from .run_record import RunRecord

_CARD = """
# {title}

{how}

## Use

```python
{use}
```

## How it was trained

{facts}

| metric | last value |
|---|---|
{metrics}

Versions: {versions}. Dataset fingerprint `{dataset}`. The run file is `config.yaml`; with the same data
`diffalign train --config config.yaml` repeats it.
{citation}"""


def _parameters(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)


def write_card(record: RunRecord, metrics: Mapping[str, Any], folder: Path) -> None:
    """Write `README.md`, a model card with provenance.

    Args:
        record: of the run.
        metrics: of the last log.
        folder (`Path`): holds the weights and the pictures of validations.
    """
    # diffusers' `load_or_create_model_card` asks the Hub for an existing card first, which stalls a machine without network.
    from diffusers.utils.hub_utils import populate_model_card
    from huggingface_hub import ModelCard, ModelCardData

    is_lora, source = record.peft_config is not None, record.backbone.source
    cls_object = source.pipeline_class()
    cls = cls_object.__name__
    use = f"from diffusers import {cls}\n\n"
    if is_lora:
        use += f'pipe = {cls}.from_pretrained("{source.name}")\npipe.load_lora_weights("path/to/this/folder")'
    else:
        # diffusers wants to be told of components that the pipeline never had, e.g. SD3 without its third encoder.
        absent = "".join(
            f", {n}=None"
            for n in ("text_encoder_3", "tokenizer_3")
            if n in _parameters(cls_object) and not source.has(n)
        )
        use += f'pipe = {cls}.from_pretrained("path/to/this/folder"{absent})'
    paper = record.paper
    link = f" ([{paper['title']}](https://huggingface.co/papers/{paper['id']}))" if paper else ""
    body = _CARD.format(
        title=folder.resolve().name,
        how=f"{'LoRA weights' if is_lora else 'A pipeline'} fine-tuned from `{source.name}` with {record.name}{link} by diffalign.",
        use=use,
        facts="\n".join(f"- {line}" for line in record.lines),
        metrics="\n".join(
            f"| {k} | {v:.5g} |"
            for k, v in sorted(metrics.items())
            if isinstance(v, (int, float)) and not math.isnan(v)
        ),
        versions=", ".join(f"{k} {v}" for k, v in versions().items()),
        dataset=record.dataset.fingerprint,
        citation=f"\n## Citation\n\n```bibtex\n{paper['citation']}\n```\n" if paper else "",
    )
    if (folder / "samples").is_dir():
        pictures = sorted(
            (folder / "samples").glob("step-*.png"), key=lambda p: int(p.stem.split("-")[1])
        )
        if pictures:
            body += f"\n![base and tuned, same seeds](samples/{pictures[-1].name})\n"
    prompts = record.validation.validation_prompts if record.validation is not None else []
    data = ModelCardData(
        base_model=source.name,
        license="other",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        widget=[{"text": prompt} for prompt in prompts] or None,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
    tags = [
        "text-to-image",
        "diffusers",
        "diffusers-training",
        "diffalign",
        *(["lora"] if is_lora else []),
        *record.tags,
    ]
    write_atomically(folder / "README.md", str(populate_model_card(card, tags=tags)).encode())
