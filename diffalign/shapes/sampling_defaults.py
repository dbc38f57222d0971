"""How the embedded pipeline is sampled when nobody says otherwise."""

from __future__ import annotations

from typing import Any

SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 2.0}
"""The default sampler settings of the embedded pipeline; every accuracy in its card is measured with them."""
