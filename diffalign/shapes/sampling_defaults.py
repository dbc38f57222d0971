"""The default settings for sampling from the embedded pipeline."""

from __future__ import annotations

from typing import Any

SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 2.0}
"""The default sampler settings. Every accuracy in the model card is measured with them.
"""
