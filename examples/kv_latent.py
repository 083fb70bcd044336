"""Makes keys and values of a model narrower, as KV-Latent does before it trains (2507.11273).

    python examples/kv_latent.py MODEL FOLDER --keys 2 --values 4

Of the rows of the projections to queries and keys every second one stays here, of those to values
every fourth one, and the same columns of the output projection. The pairs that RoPE turns stay
pairs. Their frequencies become others: the quickest are left out, and the slowest lie twice as
close. A cache of the result takes a half and a quarter of the bytes for keys and values, in
``adakv.Cache`` and in transformers' own.

This is the surgery alone. What it makes writes nonsense until it has been trained, which is not
done here; the paper trains with a billion tokens. Nothing is said about the quality of either.

The result is a model of transformers' class MiMoV2Flash with full attention and without experts,
which knows heads of two widths, so that it loads everywhere without code of its own. Llama, Mistral
and Qwen2 can be converted, if their RoPE isn't scaled.
"""

from __future__ import annotations

import argparse
import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    MiMoV2FlashConfig,
    MiMoV2FlashForCausalLM,
    PreTrainedModel,
)

CONVERTIBLE = ("llama", "mistral", "qwen2")

#: Settings that mean the same in the model and in what it becomes.
SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def convert(
    model: PreTrainedModel, keys: int = 2, values: int = 2, *, resample: bool = True
) -> PreTrainedModel:
    """A model with the weights of another one, whose keys are ``keys`` times and whose values are
    ``values`` times narrower.

    With ``resample`` RoPE has other frequencies (:func:`exponents`), if keys become narrower.

    Raises
    ------
    ValueError
        For a model of another kind, and for a width that can't be divided so.
    """
    check(model)
    dim = head_dim(model)
    for name, factor in (("keys", keys), ("values", values)):
        if factor < 1 or dim % (8 * factor):
            raise ValueError(
                f"{name} must divide the head dim into a multiple of 8, got {factor} for {dim}"
            )
    config = config_of(model.config, dim // keys, dim // values, resample=resample and keys > 1)
    with torch.device("meta"):
        made = MiMoV2FlashForCausalLM(config)
    made = made.to_empty(device=model.device).to(model.dtype)
    # Frequencies are no weights: those of an empty model have to be made again.
    made.model.rotary_emb = type(made.model.rotary_emb)(config).to(model.device)
    made.load_state_dict(
        {name: narrowed(name, x, dim, keys, values) for name, x in model.state_dict().items()}
    )
    made.tie_weights()
    made.generation_config = model.generation_config
    return made.eval()


def check(model: PreTrainedModel) -> None:
    """Raises ``ValueError`` for a model that can't be converted."""
    name, config = type(model).__name__, model.config
    if config.model_type not in CONVERTIBLE:
        raise ValueError(f"model must be one of {', '.join(CONVERTIBLE)}, got {config.model_type}")
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        raise ValueError(f"model: {name} must have RoPE without scaling, got {kind!r}")
    if any(layer.is_sliding for layer in DynamicCache(config=config).layers):
        raise ValueError(f"model: {name} must have full attention in all layers")
    with_bias = ("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
    if any(key.endswith(with_bias) for key in model.state_dict()):
        raise ValueError(f"model: {name} must have no biases but those of queries, keys and values")


def head_dim(model: PreTrainedModel) -> int:
    """Numbers of a key."""
    return int(model.model.layers[0].self_attn.head_dim)


def config_of(source: Any, dim: int, value_dim: int, *, resample: bool) -> MiMoV2FlashConfig:
    """The settings of what a model with the config ``source`` becomes."""
    theta, layers = source.rope_parameters["rope_theta"], source.num_hidden_layers
    rope: dict[str, Any] = {"rope_theta": theta, "partial_rotary_factor": 1.0}
    if resample:
        # As divisors of the frequencies that RoPE has by itself, for texts of every length.
        plain = torch.arange(0, dim, 2).double() / dim
        factors = (theta ** (exponents(dim) - plain)).tolist()
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        rope |= {"attention_factor": 1.0, "factor": 1.0}
        rope |= {"original_max_position_embeddings": source.max_position_embeddings}
    else:
        rope |= {"rope_type": "default"}
    return MiMoV2FlashConfig(
        **{name: getattr(source, name) for name in SETTINGS if hasattr(source, name)},
        head_dim=dim,
        v_head_dim=value_dim,
        attention_bias=getattr(source, "attention_bias", source.model_type == "qwen2"),
        attention_value_scale=None,
        layer_types=["full_attention"] * layers,
        mlp_layer_types=["dense"] * layers,
        rope_parameters={"full_attention": rope},
    )


def exponents(dim: int) -> Tensor:
    """``[dim / 2]`` float64: frequency i is ``theta ** -exponents[i]``.

    RoPE has them from 0 to 1 in steps of ``2 / dim``. These begin at 1/4, and go in half as long
    steps from 3/4 on.
    """
    first, last = dim // 4, 3 * dim // 4
    return torch.cat([torch.arange(first, last, 2), torch.arange(last, dim)]).double() / dim


def narrowed(name: str, x: Tensor, dim: int, keys: int, values: int) -> Tensor:
    """A weight or bias without what leaves of it: every ``keys``-th or ``values``-th number of each
    head stays."""
    step = {"q_proj": keys, "k_proj": keys, "v_proj": values}.get(name.split(".")[-2], 1)
    if name.endswith("o_proj.weight"):
        return x.unflatten(1, (-1, dim))[:, :, ::values].flatten(1)
    return x.unflatten(0, (-1, dim))[:, ::step].flatten(0, 1) if step > 1 else x


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", help="name or folder of a model of transformers")
    parser.add_argument("folder", help="where the other one is written to")
    parser.add_argument("--keys", type=int, default=2, help="how many times narrower (default: 2)")
    parser.add_argument("--values", type=int, default=2, help="the same of values (default: 2)")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    made = convert(model, given.keys, given.values)
    made.save_pretrained(given.folder)
    with suppress(OSError, ValueError):  # there may be none
        AutoTokenizer.from_pretrained(given.model).save_pretrained(given.folder)
    before, after = 2 * head_dim(model), made.config.head_dim + made.config.v_head_dim
    millions = math.fsum(x.numel() for x in made.parameters()) / 1e6
    print(
        f"{given.folder}: {millions:.0f} million weights, and {after / before:.0%} of the bytes in "
        "a cache; it has to be trained before it writes anything of use"
    )


if __name__ == "__main__":
    main()
