import subprocess
import sys

import pytest

from diffalign.data.config import DataConfig, parse_buckets
from diffalign.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ties": "x"}, "ties: expected one of drop, keep, got 'x'"),
        (
            {"verify_images": "all"},
            "verify_images: expected one of auto, header, full, none, got 'all'",
        ),
        ({"mismatch": "stretch"}, "mismatch: expected one of drop, letterbox, got 'stretch'"),
        (
            {"max_broken_fraction": 1.5},
            "max_broken_fraction: expected a share from 0 to 1, got 1.5",
        ),
        ({"resolution": 0}, "resolution: expected a number of pixels above 0, got 0"),
        ({"num_workers": -1}, "num_workers: expected 0 or more, got -1"),
        ({"aspect_ratio_buckets": "512x512"}, "aspect_ratio_buckets: expected height,width pairs"),
        (
            {"aspect_ratio_buckets": "64,64", "resolution": 64},
            "give either resolution or aspect_ratio_buckets",
        ),
    ],
)
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(ConfigError) as error:
        DataConfig(**values)
    assert message in str(error.value)


def test_buckets():
    assert parse_buckets("512,512; 640,384;") == [(512, 512), (640, 384)]
    with pytest.raises(ConfigError, match="64,64 stands twice"):
        parse_buckets("64,64;64,64")


def test_importing_the_config_imports_nothing_heavy():
    heavy = "torch datasets PIL numpy diffusers transformers"
    code = (
        f"import sys, diffalign.data, diffalign.data.config; print([m for m in {heavy.split()!r} "
        "if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
