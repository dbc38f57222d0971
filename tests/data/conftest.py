import io

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """The prepared datasets of the tests stay out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _no_bars():
    import datasets

    datasets.disable_progress_bars()


def _png(color, size=(12, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def png():
    """Encoded PNG of one colour; `size` is (width, height)."""
    return _png


@pytest.fixture
def save(tmp_path):
    """Writes an image below tmp_path and returns its path."""

    def write(name, color, size=(12, 8)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(color, size))
        return path

    return write


@pytest.fixture
def colors():
    """The colours of a group's (one-colour) images."""

    def read(group):
        names = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green"}
        return [names[image.getpixel((0, 0))] for image in group.open_images()]

    return read
