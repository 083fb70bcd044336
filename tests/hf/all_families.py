"""Every causal language model of transformers that was tried: what works, and why what doesn't.

python tests/hf/all_families.py    # the tables of docs/families.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97

#: Sizes under all names that configs have for them.
_SIZES = {
    64: "hidden_size d_model n_embd n_embed dim block_dim word_embed_proj_dim lru_width",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner ffn_hidden_size "
    "block_ff_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size "
    "shared_intermediate_size",
    16: "head_dim linear_key_head_dim linear_value_head_dim mamba_d_head",
    8: "mamba_d_state mamba_dt_rank mamba_n_heads hidden_size_per_layer_input chunk_size",
    4: "num_hidden_layers num_layers n_layer n_layers decoder_layers num_attention_heads n_head "
    "n_heads decoder_attention_heads encoder_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts linear_num_value_heads adapter_rank",
    2: "num_key_value_heads num_experts_per_tok moe_k encoder_layers linear_num_key_heads "
    "eos_token_id",
    1: "n_shared_experts first_k_dense_replace n_group topk_group bos_token_id",
    0: "pad_token_id",
    512: "max_position_embeddings n_positions",
    VOCAB: "vocab_size vocab_size_per_layer_input",
}
SIZES: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
SIZES["initializer_range"] = 0.3

#: What else a config needs to be small.
SETTINGS: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
}

_WORKS = """
afmoe apertus arcee aria_text bart beam bigbird_pegasus biogpt bitnet blenderbot blenderbot-small
cohere cohere2_moe ctrl cwm dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma
glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox granite_swa granitemoe granitemoe_swa
granitemoeshared helium hy_v3 hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna
lfm3 llama4_text marian mbart mellum minimax_m2 ministral3 modernbert-decoder nanochat nemotron
olmo olmoe opt pegasus persimmon phi phimoe plbart qwen2_moe qwen3_5_moe_text seed_oss solar_open
vaultgemma whisper zamba
"""
#: Beside the families of tests/hf/families.py.
WORKS = _WORKS.split()

UNTIL_5_23 = "codegen gptj"

#: A part of the error, the reason in the documents, and the families.
REFUSED: list[tuple[str, str, str]] = [
    (
        "latent attention",
        "latent attention (MLA): the cache holds no keys and values of heads",
        "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 glm4_moe_lite hy_v4 kimi_linear "
        "longcat_flash minicpm3 youtu",
    ),
    (
        "doesn't look its attention up",
        "attention that isn't looked up in `AttentionInterface`",
        "big_bird bloom cpmant gpt_neox_japanese megatron-bert mpt mvp openai-gpt "
        "rembert roformer trocr xglm xlm",
    ),
    (
        "doesn't look its attention up",
        "attention that isn't looked up in `AttentionInterface` before transformers 5.24",
        UNTIL_5_23,
    ),
    (
        "none named o_proj",
        "no output projection in the attention module, which the default policy weighs values by "
        "(`ada_snapkv` needs none)",
        "bert bert-generation camembert data2vec-text electra ernie roberta roberta-prelayernorm "
        "roc_bert xlm-roberta xlm-roberta-xl",
    ),
    ("no attention", "no attention, only states", "falcon_mamba mamba"),
    ("recurrent layers", "states outside of transformers' caches", "rwkv"),
    ("in its modules", "states kept in its modules", "recurrent_gemma"),
    ("one of its own", "takes only a cache class of its own", "minimax"),
    ("repeats its keys", "keys repeated between cache and attention", "jetmoe"),
    ("halves the heads", "values reshaped between cache and attention", "diffllama"),
    ("hides keys by a mask", "a mask made of all values", "doge"),
    ("bias of positions", "a bias of positions", "inkling_text inkling2_text"),
    ("index of its own", "blocks of keys chosen by an index", "minimax_m3_vl_text"),
    ("layers without common", "compressed attention of its own", "deepseek_v4"),
]

#: Refused for what all published models of a family have, in tests/hf/test_hf_errors.py.
REFUSED_AS_PUBLISHED = [
    ("heads of 512 numbers; keys and values shared between layers", "gemma4_text"),
    ("keys and values shared between layers", "gemma3n_text"),
    ("attention that it computes itself", "git"),
    ("cross-attention, whose keys are of images", "mllama"),
]


def tiny(model_type: str) -> PreTrainedModel:
    """A model of random weights, in eval mode."""
    config_class = type(AutoConfig.for_model(model_type))
    settings = dict(SIZES)
    default = config_class()
    settings = {name: size for name, size in settings.items() if _is_set(default, name)}
    names = ("layer_types", "layers_block_type")
    if not any(isinstance(getattr(config_class, name, None), property) for name in names):
        for name in names:
            types = list(dict.fromkeys(getattr(default, name, None) or ()))
            if types:
                settings[name] = (types * 4)[:4]
    settings |= SETTINGS.get(model_type, {})
    config = config_class(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "bias" in name and parameter.dim():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _is_set(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    return getattr(config, name, None) is not None


def rows() -> Iterator[str]:
    """The lines of the table in docs/families.md."""
    from hf.families import FAMILIES, HYBRIDS

    def types(families: Any) -> set[str]:
        classes = (family.config or f"{family.prefix}Config" for family in families)
        return {getattr(transformers, name).model_type for name in classes}

    def named(names: Any) -> str:
        return ", ".join(sorted(names))

    yield "| families | |"
    yield "|---|---|"
    works = types(FAMILIES) | set(WORKS) - types(HYBRIDS)
    yield f"| {named(works)} | work |"
    yield f"| {named(types(HYBRIDS))} | work; states beside full attention are transformers' own |"
    refused = [(reason, names.split()) for _, reason, names in REFUSED]
    refused += [(reason, names.split()) for reason, names in REFUSED_AS_PUBLISHED]
    for reason, names in refused:
        yield f"| {named(names)} | refused: {reason} |"


if __name__ == "__main__":
    print("\n".join(rows()))  # noqa: T201
