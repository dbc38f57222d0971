"""The embedded masked text model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_text_denoiser(folder: str | Path | None = None) -> tuple[Any, Any]:
    """Load the masked text model and its tokenizer.

    Args:
        folder (`str` or `Path`, *optional*): written by ``tools.shapes.pretrain_text``.
            None takes the embedded one. Only safetensors are read.

    Returns:
        `tuple[BertForMaskedLM, CLIPTokenizer]`: network, in evaluation mode, and
        tokenizer.
    """
    from transformers import BertForMaskedLM, CLIPTokenizer
    from transformers.utils import logging

    from . import text_weights_dir

    place = str(folder or text_weights_dir())
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = BertForMaskedLM.from_pretrained(place, use_safetensors=True).eval()
    finally:
        if shown:
            logging.enable_progress_bar()
    return model, CLIPTokenizer.from_pretrained(place)
