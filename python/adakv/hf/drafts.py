"""Draft models of assisted decoding, with caches that are compressed, too."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from adakv.hf.attachment import CACHE
from adakv.hf.cache import Cache
from adakv.policy import DEFAULT, Policy


class DraftModel:
    """A draft model for ``generate(assistant_model=...)`` whose cache is an :class:`adakv.Cache`.

    transformers makes the draft's cache itself and takes none. This is asked in the model's place:
    it adds a cache to the first call of ``generate`` for a prompt, and all else is the model's.
    Guesses that the large model refuses are taken back from the cache; of a prompt only the last
    ones, which are in the policy's window.

    Parameters
    ----------
    model : PreTrainedModel
        The draft, in eval mode and under :func:`attach` while it generates.
    policy, budget, ratio
        As of :class:`adakv.Cache`.
    options
        Its other options. Those by which tokens can't be taken back (``decode_budget``,
        ``kv_dtype="int4"`` or ``"int2"``) fail with the first refused guess.

    Raises
    ------
    ValueError
        As of :class:`adakv.Cache`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | Policy = DEFAULT,
        budget: int | None = None,
        ratio: float | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self._given = {"policy": policy, "budget": budget, "ratio": ratio, **options}
        self._new_cache()  # its errors come now

    def _new_cache(self) -> Cache:
        return Cache(self.model, **self._given)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``, with a cache if none is given."""
        if kwargs.get(CACHE) is None:
            kwargs[CACHE] = self._new_cache()
        return self.model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not made yet: while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.model, name)
