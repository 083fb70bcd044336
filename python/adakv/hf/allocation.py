"""Which pages a :class:`adakv.Cache` has, and how many: known when its first keys come, and with a
budget in bytes when its prompts' lengths do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from adakv.devices import AnyCache, Group, check_together
from adakv.errors import integer
from adakv.formats import check_page_size, page_size_for
from adakv.hf import pool_size
from adakv.policy import Budget, ByteBudget
from adakv.reading import Reader
from adakv.reselection import Rule
from adakv.shape import Shape
from adakv.tiers import Tiers


class Allocation:
    """How the pages of a cache are made.

    Parameters
    ----------
    budget : :class:`adakv.policy.Budget`
        How much is kept of its prompts.
    kv_dtype : str, optional
        The format of the pages, or several tiers. Default: as the model has keys and values, or
        what a budget in bytes finds.
    page_size : int, optional
        Entries of a page.
    max_new_tokens : int
        Tokens behind the prompts that there is room for.
    is_chunked : bool
        Whether pages are made before all of a prompt is there.

    Raises
    ------
    ValueError
        For what makes no sense, and if the format is still to be found when pages are made.
    """

    def __init__(
        self,
        budget: Budget,
        kv_dtype: str | None,
        page_size: int | None,
        max_new_tokens: int = 1,
        *,
        is_chunked: bool = False,
    ) -> None:
        bits = budget.policy.bits
        if bits is not None and bits.kv_dtype is not None:
            if kv_dtype is not None and str(Tiers.given(kv_dtype)) != bits.kv_dtype:
                raise ValueError(
                    f"kv_dtype must be that of the policy, {bits.kv_dtype!r}, got {kv_dtype!r}"
                )
            kv_dtype = bits.kv_dtype
        if isinstance(budget, ByteBudget):
            if is_chunked and kv_dtype is None:
                raise ValueError(
                    "kv_dtype must be given with chunk_budget and bytes to keep: pages are made "
                    "before the prompt's length is known, by which a format could be chosen"
                )
        elif kv_dtype is None:
            kv_dtype = "auto"
        self.kv_dtype = None
        if kv_dtype is not None:
            tiers = Tiers.given(kv_dtype)
            self.kv_dtype = str(tiers)
            tiers.check(has_biases=budget.policy.has_biases)
            if self.has_tiers and budget.policy.fold is not None:
                raise ValueError(
                    f"kv_dtype: Folded() folds into entries of one format, got {kv_dtype!r}"
                )
        self._page_size = None if page_size is None else check_page_size(page_size)
        if kv_dtype is not None:
            page_size_for(kv_dtype, page_size)
        self.max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)

    @property
    def new_tokens(self) -> int:
        """Tokens behind what a cache holds that new pages are made for."""
        return min(self.max_new_tokens, pool_size.FIRST_TOKENS)

    @property
    def tiers(self) -> Tiers | None:
        """The formats of rows, if they have several, or an order of channels."""
        tiers = None if self.kv_dtype is None else Tiers.given(self.kv_dtype)
        return None if tiers is None or tiers.is_one else tiers

    @property
    def has_tiers(self) -> bool:
        """Whether there are such."""
        return self.tiers is not None

    def check_together(
        self, groups: Sequence[Group], text: Mapping[str, object], keep_scores: bool = False
    ) -> None:
        """Raises ``ValueError`` for arguments of caches that don't go together: of those that evict
        from texts or read some pages, by their names, layers on several devices can do none, and
        several tiers neither these nor ``keep_scores``."""
        check_together(groups, next((x for x in text.values() if x is not None), None))
        if self.tiers is None:
            return
        what = "several tiers" if len(self.tiers.formats) > 1 else "mixed keys"
        if groups:
            raise ValueError(f"kv_dtype: {what} need all layers on one device")
        for name, value in {**text, "keep_scores": keep_scores or None}.items():
            if value is not None:
                raise ValueError(
                    f"{name} must be left out with {what}, got kv_dtype={self.kv_dtype!r}: "
                    "entries stay where they are"
                )

    def check_keys(self, dtype: torch.dtype, dims: tuple[int, int]) -> None:
        """Raises ``ValueError`` if pages of its format don't take keys and values like these, of so
        many numbers each."""
        if self.kv_dtype is not None:
            Tiers.given(self.kv_dtype).check(dtype, dims)

    def decide(
        self,
        budget: Budget,
        shape: Shape,
        prompt_lens: Sequence[int],
        rule: Rule | None,
        *,
        kv: AnyCache | None = None,
        new: int | None = None,
    ) -> Budget:
        """The same, but one in bytes as so many entries of one format.

        Parameters
        ----------
        budget : :class:`adakv.policy.Budget`
        shape : :class:`adakv.shape.Shape`
            That of plain pages.
        prompt_lens : ints
            Tokens of the prompts in one cache.
        rule : :class:`adakv.reselection.Rule`, optional
            How their texts are evicted from.
        kv : :class:`adakv.cache.KVCache`, optional
            Where there are pages already, which stay.
        new : int, optional
            Tokens behind the prompts that rows have room for. Default: as :meth:`make` has it.
        """
        self.check_keys(shape.dtype, shape.dims)
        if not isinstance(budget, ByteBudget):
            return budget
        formats, columns = shape.formats(self.kv_dtype, self._page_size), 0
        if kv is not None:
            formats = [(kv.kv_dtype, kv.page_size)]
            columns = max(part.max_row_pages for part in kv.parts)
        return pool_size.decided(
            budget,
            shape,
            prompt_lens,
            formats=formats,
            new=self._new(rule) if new is None else new,
            rule=rule,
            row_pages=columns,
        )

    def pages(self, budget: Budget, shape: Shape) -> tuple[Shape, int]:
        """The shape with the format of the pages, and the entries of a page."""
        if isinstance(budget, ByteBudget):
            return budget.footprint.shape, budget.footprint.page_size
        assert self.kv_dtype is not None
        page_size = page_size_for(self.kv_dtype, self._page_size)
        return replace(shape, kv_dtype=self.kv_dtype), page_size

    def make(
        self, reader: Reader, budget: Budget, shape: Shape, num_sequences: int, rule: Rule | None
    ) -> AnyCache:
        """Pages for what is kept of a reader's prompts, and for the tokens to come."""
        shape, page_size = self.pages(budget, shape)
        return pool_size.cache_of(
            reader,
            shape,
            num_sequences=num_sequences,
            new=self._new(rule),
            page_size=page_size,
            rule=rule,
        )

    def _new(self, rule: Rule | None) -> int:
        """Tokens behind each prompt that rows have room for at first."""
        if rule is not None:
            return self.max_new_tokens
        return min(self.max_new_tokens, pool_size.FIRST_TOKENS)
