"""Hashes of contents: texts, bytes, files, folders, modules, functions and options.

They name cached results and identify models in checkpoints: a change of one makes every
stored result look foreign.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def text_hash(*texts: str) -> str:
    """Hash texts, one after the other.

    Args:
        *texts (`str`): their boundaries do not count. Half characters (unpaired
            surrogates) are allowed.

    Returns:
        `str`: SHA-256 of their UTF-8 bytes, 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def bytes_digest(*parts: bytes) -> bytes:
    """Hash bytes, one part after the other.

    Args:
        *parts (`bytes`): their boundaries do not count.

    Returns:
        `bytes`: SHA-256, 32 of them.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def bytes_hash(*parts: bytes) -> str:
    """Hash bytes, as `bytes_digest` does.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    return bytes_digest(*parts).hex()


def content_hash(path: Path) -> str:
    """Hash the whole content of a file, or of a model's folder.

    Args:
        path (`Path`): a file; or a folder, whose json, txt, merges and weights files
            count, with their names.

    Returns:
        `str`: SHA-256, 64 hexadecimal digits.
    """
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


def sampled_hash(path: Path) -> str:
    """Hash the size, beginning, middle and end of a file.

    It depends on the content, yet is quick for an encoder of 10 GB.

    Args:
        path (`Path`): the file.

    Returns:
        `str`: SHA-256, 64 hexadecimal digits.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in {0, max(0, size // 2 - _CHUNK // 2), max(0, size - _CHUNK)}:
            file.seek(offset)
            digest.update(file.read(_CHUNK))
    return digest.hexdigest()


_WHOLE, _SAMPLES = 1 << 20, 1 << 16
"""Elements of a tensor that counts as a whole, and about those that count of others."""


def path_hash(path: Path) -> str:
    """Hash a file, or the weights and settings anywhere in a folder, by samples.

    Args:
        path (`Path`): the file or folder.

    Returns:
        `str`: SHA-256, 64 hexadecimal digits.
    """
    if path.is_file():
        return sampled_hash(path)
    suffixes = (*WEIGHT_SUFFIXES, ".json", ".txt", ".model")
    files = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
    return text_hash(*(f"{p.relative_to(path)}\0{sampled_hash(p)}\0" for p in files))


def scheduler_facts(scheduler: Any) -> list[Any]:
    """Return what a scheduler of diffusers is, for a hash: its class and settings.

    diffusers' own notes begin with an underscore. One lists a set, whose order differs
    from process to process.

    Args:
        scheduler: the scheduler, or an object without settings.
    """
    config = getattr(scheduler, "config", {})
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    return [type(scheduler).__qualname__, settings]


def place_hash(name: object) -> str:
    """Hash what an option names, if it is a file or folder of this machine.

    Args:
        name: a path, `FILE.py:object`, or anything else.

    Returns:
        `str`: "" for a name that is no path, such as a Hub id.
    """
    if not isinstance(name, (str, Path)) or not str(name):
        return ""
    text = str(name)
    path = Path(text.rpartition(".py:")[0] + ".py" if ".py:" in text else text).expanduser()
    return path_hash(path) if path.exists() else ""


def module_hash(module: torch.nn.Module) -> str:
    """Hash the weights of a loaded module.

    Of a tensor of more than a million elements 65,536 or more count, evenly spaced: all
    of them would take minutes for twelve billion.

    Args:
        module (`torch.nn.Module`): its class name counts too, its precision does not.

    Returns:
        `str`: the first 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        values = tensor.detach()
        if values.numel() > _WHOLE and not values.is_sparse:
            digest.update(str(tuple(values.shape)).encode())
            values = values.flatten()[:: values.numel() // _SAMPLES]
        digest.update(values.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def value_hash(value: object) -> str:
    """Hash what an option is: a plain value, a tensor, a network or a function.

    Args:
        value: anything. An object with a method `fingerprint` counts by it. Of a
            function its code, its defaults and what it closed over count, but not the
            globals that it reads. Another object counts by its printed form, which by
            default holds its address.

    Returns:
        `str`: SHA-256, 64 hexadecimal digits.
    """
    return text_hash(repr(_facts(value, ())))


def _facts(value: Any, outer: tuple[int, ...]) -> object:
    """Describe a value by plain values, whose `repr` holds all that distinguishes it.

    Args:
        value: anything.
        outer: the addresses of the values that hold it.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if id(value) in outer:  # a function that closed over itself
        return "outer"
    outer = (*outer, id(value))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Mapping):
        return sorted((str(key), repr(_facts(each, outer))) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return [_facts(each, outer) for each in value]
    if isinstance(value, (set, frozenset)):  # its order differs between processes
        return kind, sorted(repr(_facts(each, outer)) for each in value)
    if isinstance(value, type):
        return "class", f"{value.__module__}.{value.__qualname__}"
    if callable(getattr(value, "fingerprint", None)):
        return kind, value.fingerprint()
    if hasattr(value, "state_dict"):
        return kind, repr(value), module_hash(value)
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # numpy and torch
        return kind, str(value.dtype), repr(value.tolist())
    if isinstance(value, functools.partial):
        return [_facts(each, outer) for each in (value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        return [_facts(each, outer) for each in (value.__self__, value.__func__)]
    if isinstance(value, types.FunctionType):
        return _function_facts(value, outer)
    return kind, repr(value)


def _function_facts(function: types.FunctionType, outer: tuple[int, ...]) -> object:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # written in an interactive session
        source = ""
    closure = []
    for cell in function.__closure__ or ():
        try:
            closure.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            closure.append(None)
    return [
        f"{function.__module__}.{function.__qualname__}",
        source,
        # Two lambdas of one line have one source.
        _code_facts(function.__code__),
        _facts([function.__defaults__, function.__kwdefaults__, closure], outer),
    ]


def _code_facts(code: types.CodeType) -> object:
    """Describe code, and the code of functions and comprehensions within it."""
    constants = [
        _code_facts(each) if isinstance(each, types.CodeType) else repr(_facts(each, ()))
        for each in code.co_consts
    ]
    return [code.co_code, constants, code.co_names]
