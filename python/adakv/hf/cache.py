"""The cache for Hugging Face transformers, 4.57 to 5.24.

    model.forward -> Cache.update         first layer: checks everything that can go wrong
                  -> layer.update         tags the new keys with their layer and hands them back
                  -> attention function   keys without a tag: the attention the model had before
                     -> layer.attend      a prompt:     that attention, then Reader, which compacts
                                          later tokens: PlannedStep, which appends and attends

The tag is how an attention function knows its cache: it sits on the very tensor that update()
returned, so that any number of caches and models can run in turn or in threads. A prompt's dense
keys and values die with its layer's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adakv.cache import KVCache
from adakv.devices import AnyCache, SplitStep, groups_of, grow_step
from adakv.errors import Error
from adakv.hf import families, hidden, long_rope, pool_size
from adakv.hf.allocation import Allocation
from adakv.hf.attachment import cache_layers, decoder_of, is_attached, own_layers
from adakv.hf.eviction import Eviction, check_chunks
from adakv.hf.hybrid import States, full_attention_layer, has_keys
from adakv.hf.layers import LAST_TOKEN_COMES_ALONE, FullAttentionLayer, eagerly
from adakv.hf.looking import reader_of
from adakv.hf.notices import Notices
from adakv.hf.padding import Padding
from adakv.hf.repetition import Repetition
from adakv.hf.shown import ShownCache
from adakv.hf.wrappers import unwrapped
from adakv.policy import DEFAULT, Budget, ByteBudget, Policy, Protection, TokenClasses
from adakv.policy.presets import read_by
from adakv.policy.reads import Read
from adakv.reading import Part, Reader
from adakv.reselection import Rule
from adakv.shape import Shape
from adakv.step import PlannedStep

_FOR_INFERENCE = "adakv.Cache is for inference: use model.eval() and torch.no_grad()"


class Cache(ShownCache):
    """A KV cache whose prompts are cut down to what a policy keeps, for ``past_key_values=``
    (``cache=`` since transformers 5.24).

    Full-attention layers are compressed right after their prefill attention, which sees everything
    (all of them after the last one, if the policy is model-wide).
    Sliding-window layers are transformers' own, and so are the states of linear attention, Mamba
    and convolutions in hybrid models. Padding is never stored. Later forwards, of one
    token or of several, attend to what was kept and to all newer tokens.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder in eval mode, to be run under :func:`attach` and without gradients.
    policy : str or :class:`adakv.Policy`
        One of :func:`adakv.policies`, or your own. The default is the best all-rounder of
        those that read a prompt once; docs/quality.md has what it costs.
    budget : int, optional
        Mean entries to keep per kv head, the policy's window included.
    ratio : float in (0, 1], optional
        Instead of ``budget``: the share of each prompt's tokens that is kept.
    budget_bytes : int or str, optional
        Instead of ``budget``: what one sequence may take in all layers, as ``"512MiB"``, or as
        ``"10%"`` of its full cache's bytes (docs/bits.md, Budgets in bytes). Without ``kv_dtype``
        the cache takes fewer bits before it evicts.
    max_new_tokens : int
        Tokens after the prompt that the pages are made for, up to 4096. For a longer text the cache
        grows. CPU memory is taken when it is used.
    chunked_prefill : bool
        The prompt comes in several forwards (``generate(prefill_chunk_size=...)``): its keys and
        values are kept until the first forward of one token, and compressed then; a last chunk of
        one token is not taken for a part of the prompt. Without ``chunked_prefill`` a second
        forward of several tokens is a second turn, from which nothing is evicted.
    page_size : int, optional
        Entries of a page: a power of two from 8 to 256. Default: 16, or 32 with codes; int4 and
        int2 take no other than 32.
    kv_dtype : "auto", "int8", "fp8", "int4" or "int2", optional
        How pages hold keys and values: as the model has them, the default, or as codes in about
        half of the bytes, with int4 in 30 % and with int2 in 20 %; or tiers, as
        "auto:1/4 + int4:3/4", or mixed keys, as "mixed3" (docs/bits.md).
    protect : spans, masks or a list of them, optional
        Tokens of the prompt that stay: see :meth:`adakv.policy.Protection.given`.
    classes : dict, optional
        Which tokens are of an image, for policies that ask: as :func:`adakv.classes_of` finds.
    chunk_budget : int, optional
        The prompt comes in several forwards, each of which brings the heads back to so many entries
        on average (docs/texts.md): the cache never holds more than these and one chunk.
    decode_budget : int, optional
        Mean entries to keep per kv head of the tokens after the prompt, which are evicted while
        they are written (docs/texts.md). Default: all stay.
    decode_policy : str or :class:`adakv.Policy`, optional
        What chooses those that stay. Default: ``policy``.
    every : int, optional
        Tokens from one choice to the next, 128 unless the policy says another number: heads hold up
        to ``decode_budget + every`` entries of the text.
    pin_prompt : bool
        Whether what was kept of the prompt stays, beside ``decode_budget``. Else it competes with
        the text for as many entries as both have together.
    keep_scores : bool
        Whether entries keep their scores beside them, 4 bytes each, for :meth:`shrink`.
    read : str or :class:`adakv.policy.Read`, optional
        Which part of what a head holds a step reads, as ``"Quest(share=0.25)"`` (docs/reads.md).
        Default: all of it.
    """

    reading: Reader | None
    """The prompts that are being read; None as soon as what is kept of them is in pages."""
    protection: Protection  #: what must stay of the prompts after the next :meth:`reset`
    budget: Budget  #: how much is kept of them
    layer_devices = staticmethod(families.layer_devices)  #: where a decoder's layers have pages

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | Policy = DEFAULT,
        budget: int | None = None,
        ratio: float | None = None,
        *,
        max_new_tokens: int = 4096,
        chunked_prefill: bool = False,
        budget_bytes: int | str | None = None,
        page_size: int | None = None,
        kv_dtype: str | None = None,
        protect: Any = None,
        classes: Any = None,
        chunk_budget: int | None = None,
        decode_budget: int | None = None,
        decode_policy: str | Policy | None = None,
        every: int | None = None,
        pin_prompt: bool = True,
        keep_scores: bool = False,
        read: str | Read | None = None,
    ) -> None:
        model = unwrapped(model)
        decoder = decoder_of(model)
        layers = cache_layers(decoder)
        full = families.full_attention(layers)
        if not full:
            Notices().of_no_full_attention()
        families.check_writes(model, decoder)
        check_chunks(chunked_prefill, chunk_budget, keep_scores)
        self.model = decoder
        self.budget = Budget.given(policy, budget, ratio, budget_bytes)
        self._allocation = Allocation(
            self.budget, kv_dtype, page_size, max_new_tokens, is_chunked=chunk_budget is not None
        )
        self.protection, self.classes = Protection.given(protect), TokenClasses.given(classes)
        chosen, needs = self.budget.policy, self.budget.policy.needs
        self._rule = Rule.given(chosen, decode_policy, decode_budget, every, pin_prompt)
        self._groups = groups_of(self.layer_devices(decoder, full))
        self._keeps_scores, self.read = keep_scores, read_by(chosen, read)
        text = {"decode_budget": self._rule, "chunk_budget": chunk_budget, "read": self.read}
        self._allocation.check_together(self._groups, text, keep_scores)
        self._chunk_budget, self._is_chunked = chunk_budget, chunked_prefill
        self.waits = chunked_prefill or ("repeat" in needs and chunk_budget is None)  # for more
        if "w_o" in needs:
            families.check_output_projections(decoder, full)
        rotate = families.rotation(decoder) if "rotate" in needs else None
        self.model_config = decoder.config
        self.rope_limit = long_rope.limit_of(decoder.config)
        long_rope.watch(self)
        self._full = [
            full_attention_layer(self, layers[own], i, rotate, is_last=own == full[-1])
            for i, own in enumerate(full)
        ]
        for layer, ours in zip(full, self._full, strict=True):
            layers[layer] = ours
        self._with_keys = [i for i, layer in enumerate(layers) if has_keys(layer)]
        super().__init__(layers=layers)
        hidden.tell(self, needs, decoder, full)
        self._begin()

    def _begin(self) -> None:
        """Sets what belongs to the texts it holds to that of an empty cache."""
        self._repetition = Repetition(self, is_needed="repeat" in self.budget.policy.needs)
        ask = self._repetition.read_behind
        self.eviction = Eviction(self.budget, self._chunk_budget, self._rule, ask)
        self.reading = Reader(
            self.eviction.first_budget,
            len(self._full),
            protection=self.protection,
            classes=self.classes,
            keeps_scores=self._keeps_scores,
            tiers=self._allocation.tiers,
        )
        self.kept_scores: list[Tensor] | None = None
        """The scores of prompts' entries, slot by slot, ``[B, Hkv, M]`` float32 for each layer:
        ``+inf`` for entries that always stay, ``-inf`` in empty slots."""
        self._reader = None if self.read is None else reader_of(self.read, self)
        self.step: PlannedStep | SplitStep | None = None  # that is running
        self.padding = Padding()
        self.is_midway = False  # since something was stored and until the last layer has been
        self.handed_out = False  # keys were tagged, and have not come back to be attended to
        self._seen: list[int] = []  # tokens of each sequence, without padding
        self.prompt_lens: list[int] = []  # of these, those of its prompt
        self._signature: tuple[Any, ...] | None = None  # of the first keys, which may be sliding
        self._heads: tuple[int, int, int] | None = None  # of full attention: kv heads, D, Dv
        self._num_forwards = 0
        self.notices = Notices()
        self._was_asked = False  # how long it is, since it was last given keys
        self._states = States(self.layers)
        self._kv: AnyCache | None = None
        self._first = 0  # slot of sequence 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention modules, layer by layer."""
        if torch.compiler.is_compiling():
            return eagerly(self.update, key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._with_keys[0]:
            self._begin_forward(key_states, value_states)
        elif layer_idx >= len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers: it is of another model")
        if self._heads is None and isinstance(self.layers[layer_idx], FullAttentionLayer):
            self._heads = (*key_states.shape[1::2], value_states.shape[3])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Called by the model's layers that have states, once a forward for each state."""
        if state_idx == 0:
            if self._states.begin_at(layer_idx, self._num_forwards):
                self._check_whole()
            self._states.ask(layer_idx)
        state: Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    @property
    def is_initialized(self) -> bool:
        """Whether it has seen tokens; some models make the masks of their prompts by this."""
        return bool(self.layers[self._with_keys[0]].get_seq_length() > 0)

    @property
    def pages(self) -> AnyCache | None:
        """The memory in which its sequences lie, once a layer is compressed."""
        return self._kv

    @property
    def seen(self) -> list[int]:
        """How many tokens each sequence has seen, without padding."""
        return list(self._seen if self.reading is None else self.reading.lengths or self._seen)

    @torch.no_grad()
    def repeat(self, input_ids: Tensor) -> None:
        """Has the model read its prompts once more, and compresses by what it looks at.

        For policies whose scorer is :class:`adakv.policy.RepeatAttention`, between the prompts'
        forward and everything else; the cache then holds what it kept of the prompts alone.

        Parameters
        ----------
        input_ids : ``[B, R]`` int64
            An instruction such as "Repeat the previous context exactly.", and the prompts.

        Raises
        ------
        ValueError
            If the policy has another scorer, the prompts are of unequal length, or the model has
            layers with a sliding window. The cache is as it was.
        adakv.Error
            If there is no prompt that waits for it.
        """
        self._repetition.read(input_ids)

    def repeat_after_prompt(self, input_ids: Tensor) -> None:
        """:meth:`repeat`, by itself, when the first token after the next prompt comes: for
        transformers' ``generate``, which reads a prompt and goes on. With a ``chunk_budget`` the
        tokens are an instruction, such as the question, that is read behind every chunk."""
        self._repetition.wait_for(input_ids)

    def reset(self) -> None:
        """Empties the cache and gives its memory back; the next forward is a new prompt."""
        for layer in self._full:
            layer.reset()
        if len(self._full) < len(self.layers):
            # transformers' layers keep their tensors for the next prompt, but the batch may change.
            for index, fresh in enumerate(own_layers(self.model)):
                if not isinstance(self.layers[index], FullAttentionLayer):
                    self.layers[index] = fresh
        self._begin()

    def fill(self, kv: AnyCache, slot: int) -> None:
        """Empties the cache; the next prompt, of one sequence, goes into a slot of ``kv``.

        There it is decoded by :class:`adakv.hf.slots.Decoder`.
        """
        self.reset()
        self._kv, self._first = kv, slot

    def decoded_pages(self) -> tuple[AnyCache, list[int]]:
        """The pages, and the tokens that each sequence has seen: for a
        :class:`adakv.hf.slots.Decoder` to go on with; then :meth:`advance`."""
        self.check_recordable(
            "its layers without full attention have steps that can't be recorded; generate without "
            "custom_generate"
        )
        if self.reading is not None:
            self._finish_all()
        self._end_prompt()
        return self.own_pages(), self.seen

    def check_recordable(self, reason: str) -> None:
        """Raises ``ValueError`` if there are layers without full attention."""
        if len(self._full) < len(self.layers):
            raise ValueError(f"model: {reason}")

    def _begin_forward(self, keys: Tensor, values: Tensor) -> None:
        """Finds what would go wrong with new keys ``[B, Hkv, S, D]``, to be stored in the dtype of
        values ``[B, Hkv, S, Dv]``, before any layer is changed."""
        if not self._states.are_ahead(self._num_forwards):  # else it has been done
            self._check_whole()
        if keys.requires_grad:
            raise ValueError(_FOR_INFERENCE)
        batch, heads, columns, head_dim = keys.shape
        signature = (batch, heads, head_dim, values.dtype, keys.device)
        if self._signature not in (None, signature):
            raise ValueError(
                "batch, kv heads, head dim, dtype and device must stay what they were for the "
                f"prompt, {self._signature}, got {signature}"
            )
        if self._signature is None:
            self._allocation.check_keys(values.dtype, (head_dim, values.shape[3]))
        had = max(self.seen, default=0)
        long_rope.check_growth(self.rope_limit, had, had + columns, what="the text")
        self._was_asked = False
        is_after_prompt = columns == 1 and had > 0 and not LAST_TOKEN_COMES_ALONE
        if is_after_prompt or not self._is_chunked:
            self._repetition.read_waiting(batch)
        if self.reading is None:
            self.make_room(columns)
            if not self.eviction.reads_chunks:
                self.notices.of_a_second_turn(columns, self._num_forwards)
        if not self._full:  # nobody will count the padding
            self._seen = [n + columns for n in self._seen or [0] * batch]
        self._signature = signature
        self._num_forwards += 1
        if self.reading is not None and is_after_prompt:
            self._finish_all()
        if is_after_prompt and self._kv is not None:
            self._end_prompt()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens were seen, padding included."""
        self._was_asked = True
        return int(super().get_seq_length(layer_idx))

    def is_left_out(self, config: Any, columns: int) -> bool:
        """Whether a forward of so many columns, of a model with ``config``, was to have this cache
        and has another one: see :mod:`adakv.hf.long_rope`."""
        longest = max(self.rope_limit or columns, self._full[0].num_seen)
        if not self._was_asked or config is not self.model_config or columns <= longest:
            return False
        self._was_asked = False  # that is said once
        return True

    def _check_whole(self) -> None:
        """Raises unless the model can go on, and all layers have seen the same forwards."""
        if not is_attached(self.model):
            raise Error("the model is not attached: run it inside adakv.attach(model)")
        if self.model.training:
            raise ValueError(_FOR_INFERENCE)
        self.check_attended()
        lengths = {layer.num_seen for layer in self._full}
        if len(self._full) < len(self.layers):
            lengths |= {self.layers[index].get_seq_length() for index in self._with_keys}
        is_whole = len(lengths) <= 1 and self._states.are_at(self._num_forwards)
        if self.is_midway or not is_whole:
            raise Error("an earlier forward stopped midway: reset() the cache")

    def check_attended(self) -> None:
        """Raises ``adakv.Error`` if keys that were handed out did not come back to be attended to.

        Nothing was stored then: the cache can be used again.
        """
        if self.handed_out:
            self.handed_out = False
            raise Error("the last forward was stopped, or was of another model that isn't attached")

    def make_room(self, num_tokens: int) -> None:
        """Has the cache grow if there are too few pages for so many more tokens of every sequence.

        Raises ``adakv.Error`` if there is no memory for them. The cache goes on working.
        """
        assert self._kv is not None
        pool_size.make_room(self._kv, [num_tokens] * len(self._seen), self._first)

    def begin_part(self, mask: Tensor | None, batch: int, columns: int) -> None:
        """Counts the tokens of a prompt's next part of so many columns, from the model's mask."""
        assert self.reading is not None
        before = self._full[0].num_seen
        seen = self.reading.lengths if before else [0] * batch
        new = self.padding.count(mask, seen, before, columns, prompt=True)
        gaps = self.padding.order is not None or any(
            had > 0 and now < columns for had, now in zip(seen, new, strict=True)
        )
        if gaps and self.waits:
            raise ValueError("attention_mask: prompts in chunks must be padded on the left")
        lengths = [had + now for had, now in zip(seen, new, strict=True)]
        is_last = not self.waits or (columns == 1 and LAST_TOKEN_COMES_ALONE)
        self._decide(lengths)
        self.reading.begin(lengths, before + columns, is_complete=is_last)
        self.is_midway = True

    def begin_step(self, mask: Tensor | None, columns: int) -> None:
        """Makes room for a step in all layers and plans it, before the first one attends."""
        assert self._kv is not None
        before = self._full[0].num_seen
        is_chunk = self.eviction.reads_chunks
        num_new = self.padding.count_step(mask, self._seen, before, columns, is_chunk=is_chunk)
        self.is_midway = True
        watcher, reader = self.eviction.watcher, None if is_chunk else self._reader
        if reader is not None:
            assert isinstance(self._kv, KVCache)  # one of several devices was refused
            reader.begin_step(self._kv, self._seen, num_new, columns)
        self.step = grow_step(
            self._kv, num_new, columns, watcher=watcher, reader=reader, slots=self._slots
        )
        self.eviction.begin_step(num_new, columns)
        self._seen = [n + new for n, new in zip(self._seen, num_new, strict=True)]

    def end_step(self) -> None:
        """All layers have attended: chooses from the text, if it is time."""
        if self.eviction.text is not None and self.eviction.text.is_due:
            self.eviction.text.choose(self.own_pages(), self._slots)
            if self._reader is not None:
                self._reader.forget()
        self.is_midway = False

    def finish(
        self,
        layer: int,
        part: Part | None = None,
        repeat: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Chooses what is kept of a layer's prompts, and moves it into pages.

        With a model-wide policy nothing happens before the last layer, and then in all of them.
        """
        reader = self.reading
        assert reader is not None
        chosen = reader.finish(layer, part, repeat=repeat)
        if chosen:
            self._kv = self._kv or self._allocation.make(
                reader, self.eviction.budget, self._shape, len(self.seen), self._rule
            )
            reader.compact(chosen, self._kv, first_sequence=self._first)
        if reader.num_compacted == reader.num_layers:
            self._seen, self.prompt_lens, self.reading = reader.lengths, reader.lengths, None
            if reader.kept_scores is not None and self._kv is not None:
                self.kept_scores = reader.kept_scores.of(self._kv.lengths(self._slots))
            self.eviction.begin(reader.lengths, [x.attention for x in self._full], self.protection)

    def _finish_all(self) -> None:
        """:meth:`finish` of all layers, whose prompts came in chunks."""
        assert self.reading is not None
        self.reading.check_complete()
        self.is_midway = True
        for layer in range(len(self._full)):
            self.finish(layer)
        self.is_midway = False

    def _decide(self, lengths: Sequence[int]) -> None:
        """Finds how many entries a budget in bytes is, for prompts of such lengths so far."""
        if isinstance(self.budget, ByteBudget) and not self.budget.footprints:
            self.eviction.budget = self._allocation.decide(
                self.budget, self._shape, lengths, self._rule, kv=self._kv
            )
            if self.reading is not None:
                self.reading.change(self.eviction.first_budget, self.protection)

    def _end_prompt(self) -> None:
        assert self._kv is not None  # the first token behind the prompts comes
        if self.eviction.reads_chunks:
            self._decide(self.seen)
            self.eviction.budget.check(self.seen)
            self.prompt_lens = self.seen
        self.eviction.end_prompt(self._kv, self._slots, self.seen)

    @property
    def _shape(self) -> Shape:
        """What layers put into plain pages."""
        assert self._signature is not None and self._heads is not None
        *_, dtype, device = self._signature
        heads, dim, value_dim = self._heads
        shape = Shape(len(self._full), heads, dim, dtype, device, groups=self._groups)
        return replace(shape, has_biases=self.budget.policy.has_biases, value_dim=value_dim)

    @property
    def _slots(self) -> slice:
        return slice(self._first, self._first + len(self.seen))
