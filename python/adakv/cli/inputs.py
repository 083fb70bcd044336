"""What the user hands in: a model, a text, a device; and all that can be wrong with them."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import click
import torch

import adakv
from adakv.eval import files

STANDARD_OUTPUT = ("-", "/dev/stdout")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # as torch names them


class InputError(click.ClickException):
    """Something that the user gave can't be used; the message is one line."""

    exit_code = 2


@contextmanager
def refusals() -> Iterator[None]:
    """Turns what adakv refuses into one line for the user."""
    try:
        yield
    except (ValueError, adakv.Error) as error:
        raise InputError(str(error).partition("\n")[0]) from error


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or else CUDA where this build of adakv can use it."""
    reason = adakv.cuda_unavailable_reason()
    if name is None:
        return torch.device("cpu" if reason or not torch.cuda.is_available() else "cuda")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device must be cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and reason:
        raise InputError(f"--device {name}: {reason}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def read_text(path: str) -> str:
    """The text of a UTF-8 file, or of standard input for ``-``."""
    with refusals():
        text = files.read_text(path)
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return text


def check_outputs(inputs: Iterable[str | None], outputs: Mapping[str, str | None]) -> None:
    """Refuses, before the long work, files that can't be written or would overwrite an input.

    ``outputs`` are paths by the names of their options. Links don't help: files are compared.
    """
    read = [path for path in inputs if path is not None]
    written: dict[str, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        path = "/dev/stdout" if path == "-" else path
        for other in read:
            folder = os.path.dirname(path) or "."
            is_part = os.path.exists(path) and _is_same_file(folder, other)
            if is_part or _is_same_file(path, other):
                raise InputError(f"{option} {path} would overwrite {other}, which is read")
        for other, other_path in written.items():
            is_same = not os.path.exists(path) and os.path.abspath(path) == other_path
            if is_same or _is_same_file(path, other_path):
                raise InputError(f"{option} and {other} must be two files, got {path} twice")
        written[option] = os.path.abspath(path)
        _check_writable(path)


def _is_same_file(path: str, other: str) -> bool:
    """Whether both are the same file or folder; a terminal, a pipe or a device may be shared."""
    try:
        found, others = os.stat(path), os.fstat(0) if other == "-" else os.stat(other)
    except (OSError, ValueError):
        return False
    is_kept = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return is_kept and os.path.samestat(found, others)


def _check_writable(path: str) -> None:
    reason = None
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    if reason is None and os.path.isdir(path):
        reason = os.strerror(errno.EISDIR)
    target = path if os.path.exists(path) else Path(path).parent
    if reason is None and not os.access(target, os.W_OK):
        reason = os.strerror(errno.EACCES)
    if reason is not None:
        raise InputError(f"{path} can't be written: {reason}")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for it: CPUs without them take longer than in float32."""
    if device.type == "cuda":
        return True
    # Not every torch from 2.10 on tells.
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name, False) for name in BFLOAT16_INSTRUCTIONS)


def dtype_name(model: Any) -> str:
    """The type of a model's weights and cache, for people."""
    return str(model.dtype).removeprefix("torch.")


def model_name(source: str) -> str:
    """A model's name for people: of a file or folder its last part, without where it is."""
    return Path(source).resolve().name.removesuffix(".gguf") if os.path.exists(source) else source


def load_model(
    source: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Model and tokenizer from a folder, a GGUF file or a name on the Hugging Face hub.

    Without a ``dtype`` it is the one that the model was saved in (bfloat16 for GGUF files) where
    that is fast, and float32 elsewhere: on CPUs for float16, and for bfloat16 unless they have
    instructions for it. Python code that a model brings along runs only with ``trust_remote_code``.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InputError("models need transformers; pip install 'adakv[hf]'")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = Path(source)
    wanted: torch.dtype | str = dtype or "auto"
    if dtype is None and not multiplies_bfloat16(device):
        wanted = torch.float32
    if path.suffix == ".gguf":
        wanted = torch.bfloat16 if wanted == "auto" else wanted
        _check_gguf(path)
        options["gguf_file"] = path.name
        source = str(path.parent)
    elif not os.path.isdir(source) and (
        os.path.exists(source) or source.startswith((".", "/", "~"))
    ):
        wanted = "give a folder, a .gguf file or a name on the hub"
        raise InputError(f"{source} is no model: {wanted}{files.nearest(path)}")
    try:
        # transformers draws bars of its own while it reads GGUF files.
        with redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
                # Plain weights: packed ones compute in float32, and policies read the projections.
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=wanted, **options
            )
    except Exception as error:  # a broken file makes the parsers raise nearly anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it brings Python code; read it, and allow it to run with --trust-remote-code"
        raise InputError(f"{path} can't be loaded: {reason}") from error
    if wanted == "auto" and model.dtype == torch.float16 and device.type == "cpu":
        model = model.float()
    return model.to(device).eval(), tokenizer


def _check_gguf(path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InputError("GGUF files need the gguf package; pip install 'adakv[hf]'")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}{files.nearest(path)}") from error
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")


def check_prompt_length(
    model: Any, num_tokens: int, max_new_tokens: int, *, name: str = "the prompt"
) -> None:
    """Refuses what the model's positions can't hold; nothing is cut off silently."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and num_tokens + max_new_tokens > limit:
        raise InputError(
            f"{name} has {num_tokens} tokens and {max_new_tokens} new ones are asked for, but the "
            f"model takes {limit} in all: shorten the text or ask for fewer"
        )


def manual_text(tokenizer: Any, num_tokens: int) -> str:
    """About ``num_tokens`` tokens of Python's own reference manual, on strings first."""
    from pydoc_data.topics import topics

    first = [name for name in ("formatstrings", "string-methods", "strings") if name in topics]
    names = first + sorted(set(topics) - set(first))
    text = ""
    for name in names:
        text += topics[name].strip() + "\n\n"
        if len(tokens := tokenizer(text)["input_ids"]) >= num_tokens:
            return str(tokenizer.decode(tokens[:num_tokens], skip_special_tokens=True))
    return text
