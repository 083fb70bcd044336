"""What a layer does with a prompt while it is read, and when it ends; without a line of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adakv.ops import Kept
from adakv.policy import FoldingScorer, LayerInputs, Policy
from adakv.step import Attention
from adakv.vllm.later import Later
from adakv.vllm.steps import Reading

#: New tokens of a prompt from which torch's attention is faster than ours, in bfloat16 on a CPU.
READ_BY_TORCH = 32


class Prompt(NamedTuple):
    """A request that may still read its prompt."""

    first_blocks: Later  # of all that began in its first step
    place: int  # among them

    @property
    def first_block(self) -> int:
        """Its name, for the scheduler, too."""
        return int(self.first_blocks.tolist()[self.place])


class Heard(NamedTuple):
    """What is remembered of a prompt's queries."""

    queries: Tensor  # [n, Hq, D]: the window's; or the last ones, which aren't folded yet
    folded: Any = None
    lse: Tensor | None = None  # [Hq, n], of queries to be folded, where attention gave it


class LayerPrompts:
    """A layer's prompts that are being read: their entries, in whole pages, and their queries.

    Of the queries a policy gets the window's, or folds them in as they come (see
    :class:`adakv.policy.FoldingScorer`): then those of a prompt that may prove too short to be
    compressed are kept until it is long enough, so that short ones never pay.

    Parameters
    ----------
    policy : :class:`adakv.policy.Policy`
    pages : ``[N, 2, P, D]``
    attention : :class:`Attention`
    w_o : callable, optional
        Gives the ``[E, Hq * D]`` weight of the output projection.
    layer, num_layers : int
    """

    def __init__(
        self,
        policy: Policy,
        pages: Tensor,
        attention: Attention,
        *,
        w_o: Callable[[], Tensor] | None,
        layer: int,
        num_layers: int,
    ) -> None:
        self.attention = attention
        self.heard: dict[int, Heard] = {}  # by request
        self._policy, self._pages = policy, pages
        self._w_o = w_o if "w_o" in policy.needs else None
        self._layer, self._num_layers = layer, num_layers
        self._folding = policy.scorer if isinstance(policy.scorer, FoldingScorer) else None

    def is_read_by_torch(self, num_new: int) -> bool:
        """Whether so many new tokens of a prompt are better left to :meth:`read`."""
        is_plain = self.attention.softcap is None and self.attention.sink_logits is None
        on_cpu = self._pages.device.type == "cpu"
        is_faster = on_cpu and self._pages.dtype == torch.bfloat16 and num_new >= READ_BY_TORCH
        return is_plain and is_faster

    def read(self, reading: Reading, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Appends new tokens of a prompt, and attends by torch's own kernel: ``[n, Hq, D]``.

        In bfloat16 that is two to three times as fast as ours on a CPU, though it wants keys and
        values side by side.
        """
        page_size, past = self._pages.shape[2], reading.length - len(keys)
        new = torch.arange(past, reading.length)
        pages, slots = reading.page_ids[:, new // page_size], new % page_size
        for i, x in enumerate((keys, values)):
            self._pages[pages, i, slots] = x.transpose(0, 1)
        keys, values = self._entries(reading.page_ids, reading.length)
        mask = torch.ones(len(new), reading.length, dtype=torch.bool).tril(past) if past else None
        result = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.attention.scale,
            enable_gqa=True,
        )
        return result[0].transpose(0, 1)

    @property
    def wants_lse(self) -> bool:
        """Whether the log-sum-exp of new queries' logits is of use."""
        is_plain = self.attention.softcap is None and self.attention.sink_logits is None
        return self._folding is not None and is_plain

    def hear(self, reading: Reading, new: Tensor, lse: Tensor | None = None) -> None:
        """Remembers what the policy will have to know of new queries ``[n, Hq, D]``, and ``lse``
        ``[Hq, n]`` if attention gave it."""
        before = self.heard.get(reading.request, Heard(new[:0]))
        if self._folding is None:
            window = self._policy.window
            queries = torch.cat([before.queries, new[-window:]])[-window:]
            now = Heard(queries.clone())
        else:
            queries = torch.cat([before.queries, new])
            if lse is not None and len(before.queries):  # known of all of them, or it is of no use
                lse = None if before.lse is None else torch.cat([before.lse, lse], 1)
            if reading.is_long:
                part = self._inputs(queries, reading.page_ids, reading.length, lse)
                now = Heard(new[:0].clone(), self._folding.fold(before.folded, part))
            else:
                now = Heard(queries, lse=lse)
        self.heard[reading.request] = now

    def choose(
        self, request: int, page_ids: Tensor, length: int, budget: int
    ) -> tuple[LayerInputs, Kept]:
        """What to keep of a prompt in pages ``[Hkv, blocks]``; the inputs are copies."""
        queries, folded, _ = self.heard[request]
        inputs = self._inputs(queries, page_ids, length)
        scores = None if self._folding is None else self._folding.finish(folded, inputs)
        return inputs, self._policy.choose(inputs, budget, scores=scores)

    def _inputs(
        self, queries: Tensor, page_ids: Tensor, length: int, lse: Tensor | None = None
    ) -> LayerInputs:
        """The first ``length`` tokens of a prompt, and the last of their queries."""
        keys, values = self._entries(page_ids, length)
        return LayerInputs(
            queries=queries.transpose(0, 1)[None],
            keys=keys,
            values=values,
            w_o=None if self._w_o is None else self._w_o(),
            prompt_lens=(length,),
            layer=self._layer,
            num_layers=self._num_layers,
            attention=self.attention,
            lse=None if lse is None else lse[None],
        )

    def _entries(self, page_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, Hkv, length, D]``, copied."""
        keys, values = (self._pages[:, i][page_ids].flatten(1, 2)[None, :, :length] for i in (0, 1))
        return keys, values
