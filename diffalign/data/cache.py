"""Keep computed tensors on disk: latents and prompt embeddings are computed once.

A cache is a folder of safetensors shards. A process writes each of its shards to a
temporary file and then renames it. Several processes can therefore fill one cache, and
an interrupted one loses only its last shard. Reading maps the files into memory and
unpickles nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import UserError
from ..runtime.files import remove_temporaries, save_tensors

if TYPE_CHECKING:
    from safetensors import safe_open

_SEPARATOR = "|"
_DEAD_AFTER = 3600.0  # seconds; an older half-written file was left by a dead process


class TensorCache:
    """Store small dictionaries of tensors under text keys.

    Args:
        folder (`str` or `Path`): Where the shards lie. It is created on the first
            write.
        shard_entries (`int`, *optional*, defaults to `512`): Entries per file.

    Raises:
        UserError: A shard is damaged. The message says which file to delete.
    """

    def __init__(self, folder: str | Path, shard_entries: int = 512) -> None:
        self.folder, self.shard_entries = Path(folder), shard_entries
        self._pending: dict[str, dict[str, Tensor]] = {}
        self.reload()

    def reload(self) -> None:
        """Read the headers of all shards, including those that other processes wrote.

        Raises:
            UserError: A shard is damaged.
        """
        from safetensors import safe_open

        self._files: dict[Path, safe_open] = {}
        self._index: dict[str, tuple[Path, list[str]]] = {}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    names = list(file.keys())
            except Exception as error:  # safetensors raises a type of its own
                raise UserError(
                    f"cache file {path} is damaged ({error}); delete it and run again"
                ) from error
            for name in names:
                key, _, field = name.rpartition(_SEPARATOR)
                shard, fields = self._index.setdefault(key, (path, []))
                if shard == path:  # two processes may have stored one key
                    fields.append(field)

    def __contains__(self, key: str) -> bool:
        return key in self._index or key in self._pending

    def __len__(self) -> int:
        return len(self._index) + len(self._pending)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the distinct keys that are not stored yet, in their order.

        Args:
            keys (`Iterable[str]`): Keys to look up.
        """
        return [key for key in dict.fromkeys(keys) if key not in self]

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """Return the tensors stored under `key`.

        Raises:
            KeyError: The key is not stored.
        """
        if key in self._pending:
            return self._pending[key]
        from safetensors import safe_open

        path, fields = self._index[key]
        if path not in self._files:
            self._files[path] = safe_open(path, "pt").__enter__()
        # Copy: the alignment of a mapped tensor can change how a CPU rounds.
        return {
            field: self._files[path].get_tensor(f"{key}{_SEPARATOR}{field}").clone()
            for field in fields
        }

    def __getstate__(self) -> dict[str, object]:
        # A mapping must not cross a process boundary, so data-loader workers open the
        # files themselves.
        return {**self.__dict__, "_files": {}}

    def add(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store tensors under a key, and write a shard when enough are pending.

        A key says what its tensors were computed from. So nothing happens when it is
        stored already.

        Args:
            key (`str`): The key.
            tensors (`dict[str, Tensor]`): Name -> tensor, on any device.
        """
        if key in self:
            return
        self._pending[key] = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
        }
        if len(self._pending) >= self.shard_entries:
            self.flush()

    def flush(self) -> None:
        """Write the pending entries as one new shard."""
        if not self._pending:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder, _DEAD_AFTER)
        path = self.folder / f"shard-{uuid.uuid4().hex}.safetensors"
        save_tensors(
            {
                f"{k}{_SEPARATOR}{n}": t.clone()
                for k, entry in self._pending.items()
                for n, t in entry.items()
            },
            path,
        )
        for key, entry in self._pending.items():
            self._index[key] = (path, list(entry))
        self._pending = {}
