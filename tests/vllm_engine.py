"""Small engines in this process, and what happened in them; needs vllm.

They run where the installed vLLM does: on a CPU, eagerly, or on a GPU, with CUDA graphs. There
``VLLM_USE_V2_MODEL_RUNNER`` chooses the model runner, before the process starts.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import adakv.vllm
from adakv.vllm.config import Settings
from adakv.vllm.engine_cache import EngineCache

BLOCK = 32
#: A pool in which requests of up to 640 tokens are preempted.
SMALL = {"max_model_len": 640, "max_num_batched_tokens": 100, "num_gpu_blocks_override": 22}
#: N-grams; see :func:`run_elsewhere`.
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}

#: For one engine in a process, beside others on the machine.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TRITON_F32_DEFAULT": "ieee",  # plain vLLM's attention in float32, on a GPU
}


#: Of random models.
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "bos_token_id": None,
}


def random_text(rng: random.Random, length: int) -> list[int]:
    """Tokens."""
    return [rng.randrange(256) for _ in range(length)]


def save_llama(folder: Path, *, num_kv_heads: int = 2) -> str:
    """Saves a random Llama of three layers without a tokenizer; the folder."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": num_kv_heads}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).save_pretrained(folder)
    return str(folder)


def save_gemma2(folder: Path, layers: str = "sfsf") -> str:
    """Saves a random Gemma2, whose logits are capped: by default every other layer has a sliding
    window ("s"), and the others ("f") attend to all."""
    torch.manual_seed(0)
    config = Gemma2Config(
        num_hidden_layers=len(layers),
        layer_types=["sliding_attention" if x == "s" else "full_attention" for x in layers],
        head_dim=32,
        sliding_window=64,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=20,
        **SIZES,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def is_on_cuda() -> bool:
    """Whether the installed vLLM is the one for CUDA."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def of_device(*, is_compressed: bool) -> dict[str, Any]:
    """Options of small engines on the device of the installed vLLM, beside others on it."""
    if not is_on_cuda():
        return {"enforce_eager": True}
    options = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 28}
    return options | ({"attention_backend": "CUSTOM"} if is_compressed else {})


@dataclass(frozen=True)
class Compression:
    """A request was compressed, or found not worth it."""

    boundary: int
    num_outputs: int  # tokens it had written when it began, or began again after a preemption
    lengths: torch.Tensor  # [L, Hkv], what its rows kept; 0: it stays whole
    at: int | None = None  # tokens before the step that compressed it, if that isn't the boundary
    choices: tuple[int, ...] = ()  # tokens before each step that chose from its text


@dataclass
class Run:
    """What came of some requests."""

    tokens: list[list[int]]
    compressions: list[list[Compression]]
    steps: int = 0
    most_running: int = 0
    preemptions: int = 0
    most_at_once: int = 0  # tokens that a request wrote in one step
    free_blocks: list[int] = field(default_factory=list)  # after each step
    cached: list[int] = field(default_factory=list)  # prompt tokens that each did not read


def is_compressed(manager: Any) -> bool:
    """Whether a manager of blocks is ours."""
    from adakv.vllm.spec import CompressedManager

    return isinstance(manager, CompressedManager)


class Engine:
    """An engine whose scheduler and worker can be looked at.

    ``runs_ahead``: it schedules a step while the one before runs, which vLLM does on GPUs only.
    """

    def __init__(
        self,
        model: str,
        settings: Settings | None = None,
        *,
        runs_ahead: bool = False,
        **options: Any,
    ) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        adakv.vllm.register()  # as vLLM does, where adakv is installed
        given = settings and asdict(settings)
        options = {
            **of_device(is_compressed=settings is not None),
            "max_model_len": 2048,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 256,
            "block_size": BLOCK,
            "dtype": "float32",
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "additional_config": {"adakv": given} if given else {},
            "seed": 0,
        } | options
        config = EngineArgs(model, **options).create_engine_config()
        config.scheduler_config.async_scheduling = runs_ahead
        self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        self.core = self._engine.engine_core.engine_core
        self.scheduler = self.core.scheduler

    def close(self) -> None:
        """Lets go of all of it, whoever still knows this object."""
        self.core.shutdown()
        del self._engine, self.core, self.scheduler

    @property
    def manager(self) -> Any:
        """What manages the compressed caches, or the only ones."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return next(filter(is_compressed, managers), managers[0])

    @property
    def num_free(self) -> int:
        return int(self.manager.block_pool.get_num_free_blocks())

    @property
    def cache(self) -> EngineCache | None:
        """The worker's half, once it ran a step."""
        runner = self.core.model_executor.driver_worker.worker.model_runner
        builders = [g.get_metadata_builder() for groups in runner.attn_groups for g in groups]
        return next((b.cache for b in builders if getattr(b, "cache", None)), None)

    def run(
        self,
        prompts: list[list[int]],
        new_tokens: int | list[int],
        *,
        come: list[int] | None = None,
        leave: dict[int, int] | None = None,
        wishes: dict[int, Any] | None = None,
    ) -> Run:
        """Runs requests to their ends, greedily.

        ``come``: the steps before which each is added; ``leave``: steps before which some are
        aborted, ``wishes``: what some ask of adakv, by their numbers.
        """
        counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        come, leave = come or [0] * len(prompts), leave or {}
        run = Run([[] for _ in prompts], [[] for _ in prompts], cached=[0] * len(prompts))
        turns: dict[tuple[str, int], int] = {}
        names: dict[int, str] = {}
        while len(names) < len(prompts) or self._engine.has_unfinished_requests():
            for number, step in enumerate(come):
                if number not in names and step <= run.steps:
                    wish = (wishes or {}).get(number)
                    names[number] = self._add(str(number), prompts[number], counts[number], wish)
            gone = [name for number, name in names.items() if leave.get(number) == run.steps]
            self._engine.abort_request(gone, internal=True)
            written = {key: r.num_output_tokens for key, r in self.scheduler.requests.items()}
            for output in self._engine.step():
                number = int(output.request_id)
                run.cached[number] = output.num_cached_tokens or 0
                if output.finished:
                    run.tokens[number] = list(output.outputs[0].token_ids)
            self._note(run, written, turns)
        return run

    def _add(self, name: str, prompt: list[int], count: int, wish: Any) -> str:
        """Adds a request; the name that the engine gives it."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=count,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if wish is None else {"adakv": wish},
        )
        return self._engine.add_request(name, {"prompt_token_ids": prompt}, params) or name

    def _note(self, run: Run, written: dict[str, int], turns: dict[tuple[str, int], int]) -> None:
        """Notes what a step did.

        ``written``: tokens that each request had written before it; ``turns``: how many these were
        when a request began and after each of its preemptions, -1 once it is compressed.
        """
        running = self.scheduler.running
        run.steps += 1
        run.free_blocks.append(self.num_free)
        run.most_running = max(run.most_running, len(running))
        gains = [r.num_output_tokens - written.get(r.request_id, 0) for r in running]
        run.most_at_once = max([run.most_at_once, *gains])
        run.preemptions = max([run.preemptions, *(r.num_preemptions for r in running)])
        if not is_compressed(self.manager):
            return
        for request in running:
            key, turn = request.request_id, (request.request_id, request.num_preemptions)
            num_outputs = turns.setdefault(turn, written[key])
            boundary, of_request = (
                self.manager.boundary(key),
                run.compressions[int(key.split("-")[0])],
            )
            if boundary is None:
                continue
            first_block = self.manager.req_to_blocks[key][0].block_id
            is_cut = bool(self.cache.boundaries[first_block])
            lengths = self.cache.lengths[:, first_block].cpu() * is_cut
            if num_outputs >= 0:
                turns[turn] = -1
                of_request.append(Compression(boundary, num_outputs, lengths))
            at = self.manager.compressed_at(key)
            if num_outputs < 0 and is_cut and at is not None and not of_request[-1].lengths.any():
                of_request[-1] = replace(of_request[-1], lengths=lengths, at=at)
            choice = self.manager.last_choice(key)
            if choice is not None and choice not in of_request[-1].choices:
                choices = *of_request[-1].choices, choice
                of_request[-1] = replace(of_request[-1], choices=choices)


@contextlib.contextmanager
def engine(
    model: str, settings: Settings | None = None, *, kind: type[Engine] = Engine, **options: Any
) -> Iterator[Engine]:
    """An engine that is gone afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ.update(ENVIRONMENT)
    it = None
    try:
        it = kind(model, settings, **options)
        yield it
    finally:
        if it is not None:
            it.close()
        gc.collect()
        cleanup_dist_env_and_memory()


def run_elsewhere(
    model: str,
    settings: Settings | None,
    prompts: list[list[int]],
    new_tokens: int | list[int],
    **options: Any,
) -> Run:
    """What comes of requests in an engine in a process of its own, which checks that every block is
    free at the end.

    Engines with drafts are started so. They import numba, and behind that vLLM can't start another
    engine in the same process, unless it has triton: it looks for kernels in the ``vars`` of all
    that modules hold, and llvmlite holds a library that answers to every name.
    """
    return elsewhere(_run, model, settings, prompts, new_tokens, options)


def elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        return processes.submit(function, *args).result()


def _run(
    model: str,
    settings: Settings | None,
    prompts: list[list[int]],
    new_tokens: int | list[int],
    options: dict[str, Any],
) -> Run:
    with engine(model, settings, **options) as it:
        run = it.run(prompts, new_tokens)
        assert it.num_free == it.manager.block_pool.num_gpu_blocks - 1
    return run
