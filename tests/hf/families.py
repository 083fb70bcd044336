"""Model families, tiny and with random weights: one row each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97
V4 = transformers.__version__.startswith("4.")


@dataclass(frozen=True)
class Family:
    """``prefix`` names transformers' classes; ``settings`` go into the config."""

    prefix: str
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = ""  # of the config class, if it isn't prefix + Config
    in_4_57: bool = True

    def __str__(self) -> str:
        return self.prefix

    @property
    def is_available(self) -> bool:
        return not V4 or self.in_4_57

    def model(self, **settings: Any) -> PreTrainedModel:
        """In eval mode, with weights so large that attention is far from even."""
        settings = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attn_implementation": "eager",
            **self.settings,
            **settings,
        }
        config = getattr(transformers, self.config or f"{self.prefix}Config")(**settings)
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, f"{self.prefix}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if "sinks" in name or "bias" in name:  # made as zeros
                torch.nn.init.normal_(parameter, std=4.0 if "sinks" in name else 0.3)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the only one that knows float64
        return model.eval()


_types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_mixed = {"sliding_window": 12, "layer_types": _types}
_experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

LLAMA = Family("Llama")

FAMILIES = [
    LLAMA,
    Family("Mistral", {"sliding_window": None}),
    Family("Mistral", {"sliding_window": 12}),
    Family("Mixtral", {"sliding_window": None, "num_local_experts": 4}),
    Family("Qwen2"),
    Family("Qwen3", {"head_dim": 32}),
    Family("Qwen3Moe", {"head_dim": 16, **_experts}),
    Family("Phi3", {"sliding_window": None}),
    Family("Gemma2", {"head_dim": 16, "sliding_window": 12, "attn_logit_softcapping": 2.0}),
    Family("Gemma3", {"head_dim": 32, **_mixed}, "Gemma3TextConfig"),
    Family("GptOss", {"head_dim": 16, "sliding_window": 12, "num_local_experts": 4}),
    Family("Cohere2", _mixed),
    Family("Olmo2"),
    Family("Olmo3", _mixed),
    Family("Granite", {"attention_multiplier": 0.3}),
    Family("Glm", {"head_dim": 16}),
    Family("Starcoder2", {"sliding_window": None}),
    Family("SmolLM3"),
    Family(
        "MiMoV2Flash",
        {"head_dim": 24, "v_head_dim": 16, "mlp_layer_types": ["dense"] * 4, **_mixed},
        in_4_57=False,
    ),
    Family("StableLm", in_4_57=False),  # looks its attention up in the interface since 5.0
]

_states = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_delta = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": _states,
}
_mamba = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}

#: What they keep beside keys and values is transformers', since 5.x in layers of one cache.
HYBRIDS = [
    Family("Qwen3Next", {"head_dim": 16, **_delta, **_experts}, in_4_57=False),
    Family("Qwen3_5", {"head_dim": 16, **_delta}, "Qwen3_5TextConfig", in_4_57=False),
    Family(
        "GraniteMoeHybrid",
        {"layer_types": _states, "num_local_experts": 4, "shared_intermediate_size": 32, **_mamba},
        in_4_57=False,
    ),
    Family("Lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"]}, in_4_57=False),
    Family("FalconH1", {"mamba_d_ssm": 128, **_mamba}, in_4_57=False),
    Family(
        "Jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        in_4_57=False,
    ),
    Family(
        "NemotronH",
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        in_4_57=False,
    ),
    Family("OlmoHybrid", _delta, in_4_57=False),
    Family("Bamba", {"attn_layer_indices": [1, 3], **_mamba}, in_4_57=False),
    Family(
        "Zamba2",
        {
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "chunk_size": 8,
            "adapter_rank": 4,
        },
        in_4_57=False,
    ),
]
