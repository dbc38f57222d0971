"""Content hashes of files, folders and loaded modules."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def content_hash(path: Path) -> str:
    """SHA-256 of a file; of a folder, of its json, txt, merges and weights files, by name."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()
    weights = list(path.glob("*.safetensors")) or [
        p for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES
    ]
    for part in sorted([*path.glob("*.json"), *path.glob("*.txt"), *weights]):
        digest.update(part.name.encode() + b"\0" + content_hash(part).encode())
    return digest.hexdigest()


_CHUNK = 1 << 20


def _sampled_hash(path: Path) -> str:
    """Hash of a file's size, beginning, middle and end: content-based, yet quick for a 10 GB encoder."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in {0, max(0, size // 2 - _CHUNK // 2), max(0, size - _CHUNK)}:
            file.seek(offset)
            digest.update(file.read(_CHUNK))
    return digest.hexdigest()


def module_hash(module: torch.nn.Module) -> str:
    """Content hash of a loaded module's weights."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
