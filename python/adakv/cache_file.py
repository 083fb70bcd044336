"""Caches in files: what C++ writes and reads of them (docs/memory.md, Files)."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from adakv import _C
from adakv.cache import KVCache


class CacheFile:
    """A file that :func:`save_cache` wrote, open.

    Its head and its lengths were checked. It is mapped: nobody may write to it meanwhile.

    Raises
    ------
    OSError
        If there is no such file.
    adakv.Error
        If it is no cache, was cut or altered, or has another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        with open(path, "rb"):
            self._file = _C.CacheFile(self.name)
        self.texts = self._file.texts  #: what is said beside the tensors, by name
        self.seen = self._file.seen  #: tokens of each sequence
        self.has_biases = self._file.has_biases  #: whether entries have them
        self.lengths = self._file.lengths()  #: ``[L, B, Hkv]`` int32: entries of the rows

    def others(self) -> dict[str, Tensor]:
        """The tensors that were saved beside the cache, in the file's memory, which must not be
        written to. Raises ``adakv.Error`` if one was altered."""
        return {name: self._file.other(name) for name in self._file.others()}

    def load(self, kv: KVCache) -> None:
        """Puts what the file holds into the first sequences of a cache, which must be empty.

        Raises ``adakv.Error`` if it was altered or there are too few free pages, and ``ValueError``
        for a cache of other layers, heads, dtype, format or biases. Then the sequences are empty.
        """
        self._file.load(kv._cache)


def save_cache(
    path: str | os.PathLike[str],
    kv: KVCache,
    texts: Mapping[str, str],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes what all sequences hold to a file, which is there as a whole or not at all.

    Parameters
    ----------
    path : str or Path
    kv : :class:`adakv.cache.KVCache`
    texts : mapping of str to str
        What :attr:`CacheFile.texts` will say besides the cache's own.
    others : mapping of str to tensor, optional
        Tensors of up to four dimensions to be kept beside the cache.

    Raises
    ------
    adakv.Error
        If the file can't be written.
    ValueError
        If a sequence holds nothing, or a name is one of the format's.
    """
    beside = {name: x.contiguous().cpu() for name, x in (others or {}).items()}
    _C.save_cache(os.fspath(path), kv._cache, dict(texts), beside)
