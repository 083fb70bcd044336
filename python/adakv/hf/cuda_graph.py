"""Decode steps as they are, compiled, or replayed from CUDA graphs; and transformers' ``generate``
with such steps, through ``custom_generate=``.

A model's forward in PyTorch takes the host milliseconds, a replay microseconds.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers import StoppingCriteriaList as StoppingCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from adakv.hf import families, long_rope
from adakv.hf.attachment import CACHE
from adakv.hf.cache import Cache
from adakv.hf.pool_size import FIRST_TOKENS
from adakv.hf.slots import Decoder
from adakv.hf.wrappers import unwrapped

#: What arguments are called that bring images, videos and sounds.
_BESIDE = ("mm_encoder_outputs", "pixel_values", "image_", "video_", "input_features")


class Steps:
    """Runs the steps of a decoder.

    Parameters
    ----------
    decoder : :class:`adakv.hf.slots.Decoder`
    cuda_graph : bool
        On CUDA, record the step of each width once and replay it.
    compile : bool
        Let ``torch.compile`` fuse the step before: a minute or more for the first one.
    """

    def __init__(self, decoder: Decoder, *, cuda_graph: bool = True, compile: bool = False) -> None:
        self._decoder = decoder
        is_split = len(decoder.kv.parts) > 1
        if compile and is_split:
            places = ", ".join(str(part.device) for part in decoder.kv.parts)
            raise ValueError(f"compile must be False with layers on several devices, got {places}")
        self._compiles = compile
        is_recordable = not is_split and not families.loads_weights(decoder.model)
        self._records = cuda_graph and decoder.slots.tokens.is_cuda and is_recordable
        self._layers = decoder.kv.layers  # that the steps below read
        self._runs: dict[int, Callable[[], object]] = {}

    def run(self, num_slots: int) -> None:
        """A step of the first slots, of so many at least, after :meth:`Decoder.grow`."""
        if self._layers is not self._decoder.kv.layers:  # the cache has grown
            self._layers = self._decoder.kv.layers
            self._runs.clear()
        width = self._width(num_slots)
        if width not in self._runs:
            self._runs[width] = self._prepare(width)
        self._runs[width]()

    def _width(self, num_slots: int) -> int:
        """All slots if compiled; of those that are recorded 1, 2, 4, 8, 16, 24 and so on."""
        most = len(self._decoder.slots.tokens)
        if self._compiles:
            return most
        if not self._records:
            return num_slots
        if num_slots > 8:
            return min(most, -(-num_slots // 8) * 8)
        return min(most, 1 << (num_slots - 1).bit_length())

    def _prepare(self, width: int) -> Callable[[], object]:
        step: Callable[[], object] = self._decoder.step(width)
        if self._compiles:
            step = torch.compile(step, fullgraph=True, dynamic=False)
        if not self._records:
            return step
        with self._decoder.idle():
            side = _side_stream(torch.cuda.current_device())
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # torch asks for this before recording
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with _nothing_collected(), torch.cuda.graph(graph, stream=side):
                step()
        return graph.replay


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Python's garbage collector waits: a cache or a graph that it frees ends a recording."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Where steps are recorded: one for all, as cuBLAS keeps a workspace for each it has seen."""
    return torch.cuda.Stream(device)


class _Logits:
    """Stands where a step chooses a token, and keeps the logits for those who choose outside."""

    def __init__(self) -> None:
        self.kept = torch.empty(0)  # [B, V]

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Any token: the loop puts its own in its place."""
        if self.kept.shape != logits.shape:
            self.kept = torch.empty_like(logits)
        self.kept.copy_(logits)
        return torch.zeros_like(uniforms, dtype=torch.int64)


@torch.no_grad()
def cuda_graph_sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteria,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """A decoding loop for ``model.generate(..., custom_generate=adakv.cuda_graph_sample)``.

    Greedy and sampled generation as transformers' own loop does it, with its logits processors and
    stopping criteria. The step over one token of each sequence is recorded in a CUDA graph once a
    call and then replayed, which takes the host microseconds instead of milliseconds; on the CPU it
    runs as it is. With a ``decode_budget`` entries are chosen between replays. (transformers gives
    no streamer to loops other than its own.)

    The cache given must be a :class:`adakv.Cache` of a model without sliding windows.

    Raises
    ------
    ValueError
        If it is not; for ``num_beams`` above 1; for scores or attentions as outputs; for images.
    """
    cache = _checked(generation_config, model_kwargs)
    length = input_ids.shape[1]
    most = (generation_config.max_length or 2**31) - length
    what = f"max_new_tokens: the prompt has {length} tokens, and its text of {most} more"
    long_rope.check_growth(cache.rope_limit, length, length + most - 1, what=what)
    logits = _read(model, input_ids, cache, model_kwargs.get("attention_mask"))
    chooser = _Logits()
    pages, seen = cache.decoded_pages()
    text, rule = cache.eviction.text, cache.eviction.decode
    decoder = Decoder(unwrapped(model), pages, chooser, rule, cache.read)
    decoder.take_over(seen, text)
    steps = Steps(decoder)
    pad = generation_config._pad_token_tensor
    unfinished = torch.ones_like(input_ids[:, :1])
    num_steps = room = 0
    try:
        while True:
            scores = logits_processor(input_ids, logits.float())
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)
            else:
                tokens = scores.argmax(-1, keepdim=True)
            if pad is not None:
                tokens = torch.where(unfinished > 0, tokens, pad)
            input_ids = torch.cat([input_ids, tokens], dim=1)
            unfinished &= ~stopping_criteria(input_ids, None)[:, None]
            if not unfinished.any():
                break
            decoder.slots.tokens.copy_(tokens)
            decoder.slots.written.zero_()  # the step leaves nothing to its own chance
            if num_steps == room:  # made for many steps, as what a graph reads must stay in place
                ahead = FIRST_TOKENS if text is None else text.num_until_full
                room += max(min(most - room, ahead), 1)
                cache.make_room(room - num_steps)
            decoder.grow()
            steps.run(len(tokens))
            num_steps += 1
            decoder.end_step()
            logits = chooser.kept
    finally:
        decoder.hand_back()
        cache.advance(num_steps)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE: cache})
    return input_ids


def _checked(generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> Cache:
    """The cache; raises ``ValueError`` for what :func:`cuda_graph_sample` can't do."""
    cache = model_kwargs.get(CACHE)
    if not isinstance(cache, Cache):
        raise ValueError(f"{CACHE} must be an adakv.Cache, got {type(cache).__name__}")
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(f"num_beams must be 1, got {generation_config.num_beams}")
    for name in ("scores", "logits", "attentions", "hidden_states"):
        if getattr(generation_config, f"output_{name}", False):
            raise ValueError(f"output_{name} must be False: the recorded step gives tokens only")
    for name, given in model_kwargs.items():
        if name.startswith(_BESIDE) and given is not None:
            raise ValueError(
                f"images and sounds must not be given to cuda_graph_sample, which reads tokens "
                f"alone, got {name}: leave custom_generate out, or use adakv.generate_batch"
            )
    return cache


def _read(model: PreTrainedModel, input_ids: Tensor, cache: Cache, mask: Tensor | None) -> Tensor:
    """Reads the tokens that are not in the cache yet; the logits of the last, ``[B, V]``."""
    new = input_ids[:, cache.get_seq_length() :]
    positions = None
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
    output = model(
        new,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{CACHE: cache},
    )
    logits: Tensor = output.logits[:, -1]
    return logits
