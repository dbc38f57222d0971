"""Keep computed tensors on disk: latents and prompt embeddings are computed once.

A cache is a folder of safetensors shards. A process writes each of its shards to a
temporary file and then renames it. Several processes can therefore fill one cache, and
an interrupted one loses only its last shard. Reading maps the files into memory and
unpickles nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..runtime.files import make_folder, read_tensors, remove_temporaries, save_tensors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from safetensors import safe_open

_SEPARATOR = "|"
_INDEX = "index.safetensors"
_SHARDS_WITHOUT_INDEX = 16
_DIGEST = "S16"
_SHARD_BYTES = 256 * 2**20  # pending bytes at which a shard is written
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
        self._pending_bytes = 0
        self.reload()

    def reload(self) -> None:
        """Learn what all shards hold, including those that other processes wrote.

        Raises:
            UserError: A shard is damaged.
        """
        from safetensors import safe_open

        self._files: dict[Path, safe_open] = {}
        self._index: dict[str, tuple[Path, list[str]]] = {}
        shards = {
            path.name: path.stat().st_size for path in self.folder.glob("shard-*.safetensors")
        }
        self._stored = _Index.read(self.folder, shards)
        unknown = [name for name in sorted(shards) if name not in self._stored.shards]
        for name in unknown:
            path = self.folder / name
            try:
                with safe_open(path, "pt") as file:
                    names = list(file.keys())
            except Exception as error:  # safetensors raises a type of its own
                raise UserError(
                    f"cache file {path} is damaged ({error}); delete it and run again"
                ) from error
            for entry in names:
                key, _, field = entry.rpartition(_SEPARATOR)
                shard, fields = self._index.setdefault(key, (path, []))
                if shard == path:  # two processes may have stored one key
                    fields.append(field)
        if len(unknown) > _SHARDS_WITHOUT_INDEX:
            self._stored = self._stored.with_entries(self._index, shards)
            self._stored.write(self.folder)
            self._index = {}

    def _place(self, key: str) -> tuple[Path, list[str]] | None:
        """The shard of a key, and the names of its tensors."""
        if key in self._index:
            return self._index[key]
        stored = self._stored.find(key)
        return None if stored is None else (self.folder / stored[0], stored[1])

    def __contains__(self, key: str) -> bool:
        return key in self._pending or self._place(key) is not None

    def __len__(self) -> int:
        return len(self._stored) + len(self._index) + len(self._pending)

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

        place = self._place(key)
        if place is None:
            raise KeyError(key)
        path, fields = place
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
        self._pending_bytes += sum(t.nbytes for t in self._pending[key].values())
        if len(self._pending) >= self.shard_entries or self._pending_bytes >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the pending entries as one new shard."""
        if not self._pending:
            return
        make_folder(self.folder, "the cache")
        remove_temporaries(self.folder, _DEAD_AFTER)
        path = self.folder / f"shard-{uuid.uuid4().hex}.safetensors"
        save_tensors(
            {
                f"{k}{_SEPARATOR}{n}": _alone(t)
                for k, entry in self._pending.items()
                for n, t in entry.items()
            },
            path,
        )
        for key, entry in self._pending.items():
            self._index[key] = (path, list(entry))
        self._pending, self._pending_bytes = {}, 0


def _alone(tensor: Tensor) -> Tensor:
    """Copy a tensor that is a part of a larger storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _Index:
    """What the shards of a folder hold: sorted digests of keys, and places.

    Attributes:
        shards: Name -> size of the shards that it covers.
    """

    def __init__(
        self,
        digests: npt.NDArray[np.void],
        places: npt.NDArray[np.int32],
        shards: dict[str, int],
        fields: list[list[str]],
    ) -> None:
        self.digests, self.places = digests, places
        self.shards, self.fields = shards, fields
        self._names = list(shards)

    def __len__(self) -> int:
        return len(self.digests)

    def find(self, key: str) -> tuple[str, list[str]] | None:
        """The shard of a key and the names of its tensors, or None."""
        digest = _digests([key])
        place = int(self.digests.searchsorted(digest)[0]) if len(self.digests) else 0
        if place == len(self.digests) or self.digests[place] != digest[0]:
            return None
        shard, fields = self.places[place]
        return self._names[shard], self.fields[fields]

    def with_entries(
        self, entries: Mapping[str, tuple[Path, list[str]]], shards: dict[str, int]
    ) -> _Index:
        """An index of this one's entries and others."""
        import numpy as np

        names, fields = list(shards), [*self.fields]
        number = {name: i for i, name in enumerate(names)}
        sets = {tuple(each): i for i, each in enumerate(fields)}
        rows = []
        for path, found in entries.values():
            if tuple(found) not in sets:
                sets[tuple(found)] = len(fields)
                fields.append(found)
            rows.append((number[path.name], sets[tuple(found)]))
        old = self.places.copy()
        if len(old):
            old[:, 0] = np.array([number[name] for name in self._names], np.int32)[old[:, 0]]
        digests = np.concatenate([self.digests, _digests(list(entries))])
        places = np.concatenate([old, np.array(rows, np.int32).reshape(-1, 2)])
        order = digests.argsort(kind="stable")
        digests, places = digests[order], places[order]
        first = np.append(True, digests[1:] != digests[:-1]) if len(digests) else slice(None)
        return _Index(digests[first], places[first], shards, fields)

    @classmethod
    def read(cls, folder: Path, shards: Mapping[str, int]) -> _Index:
        """Read the index of a folder, without shards that are gone or have changed."""
        import numpy as np

        try:
            tensors, facts = read_tensors(folder / _INDEX)
            covered: dict[str, int] = json.loads(facts["shards"])
            fields: list[list[str]] = json.loads(facts["fields"])
            digests = np.ascontiguousarray(tensors["digests"].numpy()).view(_DIGEST).reshape(-1)
            places = tensors["places"].numpy()
            if len(digests) != len(places):
                raise ValueError("the index is damaged")
        except Exception:  # missing or damaged: the shards are read
            return cls(np.empty(0, _DIGEST), np.empty((0, 2), np.int32), {}, [])
        stays = np.array([shards.get(name) == size for name, size in covered.items()], bool)
        if not stays.all():
            kept = stays[places[:, 0]]
            digests, places = digests[kept], places[kept].copy()
            places[:, 0] = (stays.cumsum() - 1)[places[:, 0]]
            covered = {n: s for (n, s), stay in zip(covered.items(), stays, strict=True) if stay}
        return cls(digests, places, covered, fields)

    def write(self, folder: Path) -> None:
        """Write the index. A folder that cannot be written to has none."""
        import numpy as np
        import torch

        tensors = {
            "digests": torch.from_numpy(
                np.ascontiguousarray(self.digests).view(np.uint8).reshape(-1, 16).copy()
            ),
            "places": torch.from_numpy(self.places.copy()),
        }
        facts = {"shards": json.dumps(self.shards), "fields": json.dumps(self.fields)}
        with contextlib.suppress(OSError, SafetensorError):
            save_tensors(tensors, folder / _INDEX, metadata=facts)


def _digests(keys: Sequence[str]) -> npt.NDArray[np.void]:
    """16 bytes of a hash of each key. Of a billion keys, no two are the same."""
    import numpy as np

    joined = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
    return np.frombuffer(joined, _DIGEST)
