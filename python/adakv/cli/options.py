"""Options that commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import click

import adakv
from adakv.cli import output
from adakv.cli.inputs import (
    DTYPES,
    InputError,
    choose_device,
    dtype_name,
    load_model,
    refusals,
)
from adakv.cli.measure import Run, Setting
from adakv.cli.progress import progress_bar
from adakv.cli.types import FILE, FORMATS, TEXT
from adakv.policy.amount import Amount

DEFAULT_RATIO = 0.1
TRUST_HELP = "Let Python code that the model brings along run."


def file_option(*names: str, **settings: Any) -> Callable[..., Any]:
    """An option whose value is a path."""
    return click.option(*names, type=FILE, metavar="FILE", **settings)


@dataclass(frozen=True)
class Place:
    """How the model runs, and where the results go."""

    dtype: str  #: auto or one of DTYPES
    device: str | None
    json_path: str | None
    plot_path: str | None
    trust_remote_code: bool = False

    @property
    def outputs(self) -> dict[str, str | None]:
        """Paths by the names of their options."""
        return {"--json": self.json_path, "--plot": self.plot_path}

    def load(self, source: str, *kv_dtypes: str | None) -> tuple[Any, Any]:
        """Model and tokenizer, for caches with pages of some formats, None for whichever fits:
        codes stand for 16-bit numbers, also on CPUs where float32 is faster."""
        with progress_bar("loading the model") as advance:
            loaded = self.load_silently(source, *kv_dtypes)
            advance()
        return loaded

    def load_silently(self, source: str, *kv_dtypes: str | None) -> tuple[Any, Any]:
        """The same, without a progress bar."""
        device = choose_device(self.device)
        dtype = DTYPES.get(self.dtype)
        if dtype is None and set(kv_dtypes) - {"auto"} and device.type == "cpu":
            dtype = DTYPES["bfloat16"]
        return load_model(
            source, dtype=dtype, device=device, trust_remote_code=self.trust_remote_code
        )

    def save(self, runs: list[Run], source: str, model: Any) -> None:
        """Writes the files that were asked for."""
        if self.json_path:
            content = {"model": source, "dtype": dtype_name(model), "machine": output.machine()}
            output.write_json(self.json_path, content | {"runs": [run.as_dict() for run in runs]})
        if self.plot_path:
            output.plot_kept(self.plot_path, runs)


question_option = click.option(
    "--question",
    type=TEXT,
    help="Ask this after the text, in the model's chat template if it has one.",
)


def max_new_tokens_option(*, default: int, least: int) -> Callable[..., Any]:
    """How much is written."""
    return click.option(
        "--max-new-tokens",
        type=click.IntRange(min=least),
        default=default,
        show_default=True,
        metavar="TOKENS",
        help="Write at most so many tokens.",
    )


def place_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of :class:`Place`, as its argument ``place``."""

    @functools.wraps(command)
    def with_place(
        *,
        dtype: str,
        device: str | None,
        json_path: str | None,
        plot_path: str | None,
        trust_remote_code: bool,
        **rest: Any,
    ) -> None:
        command(place=Place(dtype, device, json_path, plot_path, trust_remote_code), **rest)

    types, device_help = (
        ["auto", *DTYPES],
        "Run the model on this device.  [default: cuda where it can be used]",
    )
    for option in (
        click.option("--trust-remote-code", is_flag=True, help=TRUST_HELP),
        file_option("--plot", "plot_path", help="Draw the results (PNG, or SVG if FILE ends so)."),
        file_option("--json", "json_path", help="Write the results as JSON."),
        click.option("--device", metavar="cpu|cuda", help=device_help),
        click.option(
            "--dtype",
            type=click.Choice(types),
            default="auto",
            show_default=True,
            help="Hold weights and cache in this type. auto is the model's own, but float32 on "
            "CPUs that have no instructions for it (bfloat16 with a --kv-dtype).",
        ),
    ):
        with_place = option(with_place)
    return with_place


def setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a :class:`Setting`, as its argument ``setting``."""

    @functools.wraps(command)
    def with_setting(
        *,
        policy: str,
        budget: int | None,
        ratio: float | None,
        budget_bytes: str | None,
        kv_dtype: str | None,
        **rest: Any,
    ) -> None:
        command(setting=check_setting(policy, budget, ratio, budget_bytes, kv_dtype), **rest)

    ratio_help = f"Keep this share of a prompt's entries.  [default: {DEFAULT_RATIO}]"
    policy_help = "Let this policy choose the entries that stay; `adakv policies` lists them."
    budget_help = "Keep so many entries of a prompt in each kv head on average."
    bytes_help = (
        "Let a prompt's cache take so many bytes, as 512MiB or 10% (of the full cache). It takes "
        "fewer bits first, unless --kv-dtype is given, then fewer entries."
    )
    bits_help = (
        "Hold entries as the model has them (auto), in a half to a fifth of the bytes, in tiers, "
        "as auto:1/4+int4:3/4, with fewer dimensions as channels=.6, or with keys of 3 bits on "
        "average as mixed3.  "
        "[default: auto; with --budget-bytes what fits]"
    )
    for option in (
        click.option(
            "--kv-dtype",
            type=FORMATS,
            help=bits_help,
        ),
        click.option("--budget-bytes", metavar="BYTES", help=bytes_help),
        click.option("--ratio", type=float, metavar="SHARE", help=ratio_help),
        click.option("--budget", type=int, metavar="ENTRIES", help=budget_help),
        click.option(
            "--policy",
            default=adakv.policy.DEFAULT,
            show_default=True,
            metavar="POLICY",
            help=policy_help,
        ),
    ):
        with_setting = option(with_setting)
    return with_setting


def check_setting(
    policy: str,
    budget: int | None,
    ratio: float | None,
    budget_bytes: str | None = None,
    kv_dtype: str | None = None,
) -> Setting:
    """The policy and its budget, checked before anything is loaded."""
    bits = output.find_policy(policy, "--policy").bits
    given = {"--budget": budget, "--ratio": ratio, "--budget-bytes": budget_bytes}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"give {' or '.join(names)}, not both")
    if budget is not None and budget < 1:
        raise InputError(f"--budget must be at least 1, got {budget}")
    if ratio is not None and not 0 < ratio <= 1:
        raise InputError(f"--ratio must be above 0 and at most 1, got {ratio}")
    if budget_bytes is not None:
        with refusals():
            Amount.given("--budget-bytes", budget_bytes)
    elif kv_dtype is None:
        kv_dtype = "auto" if bits is None else bits.kv_dtype
    if not names:
        ratio = DEFAULT_RATIO
    return Setting(policy, budget, ratio, budget_bytes, kv_dtype)


def _checked_read(
    context: click.Context, parameter: click.Parameter, read: str | None
) -> str | None:
    if read is not None:
        with refusals():
            adakv.policy.get_read(read)
    return read


def _checked_policy(
    context: click.Context, parameter: click.Parameter, policy: str | None
) -> str | None:
    if policy is not None:
        output.find_policy(policy, parameter.opts[0])
    return policy


#: Which pages a step reads.
read_option = click.option(
    "--read",
    metavar="READ",
    callback=_checked_read,
    help='Let each step read a part of what is kept, as "Quest(share=0.125)".  [default: all]',
)


def every_option(option: str) -> Callable[[Any], Any]:
    """``--every``, which goes with another option."""
    return click.option(
        "--every",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help=f"With {option}: choose after every so many tokens.  [default: 128]",
    )


def text_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command with a ``setting`` the options of what its steps evict, and what they
    read."""

    @functools.wraps(command)
    def with_text(
        *,
        setting: Setting,
        decode_budget: int | None,
        decode_policy: str | None,
        every: int | None,
        evict_prompt: bool,
        read: str | None,
        **rest: Any,
    ) -> None:
        setting = replace(
            setting,
            decode_budget=decode_budget,
            decode_policy=decode_policy,
            every=every,
            pin_prompt=not evict_prompt,
            read=read,
        )
        command(setting=setting, **rest)

    for option in (
        read_option,
        click.option(
            "--evict-prompt", is_flag=True, help="Evict from what was kept of the prompt, too."
        ),
        every_option("--decode-budget"),
        click.option(
            "--decode-policy",
            metavar="POLICY",
            callback=_checked_policy,
            help="Let this policy choose what stays of the written text.  [default: as --policy]",
        ),
        click.option(
            "--decode-budget",
            type=click.IntRange(min=1),
            metavar="ENTRIES",
            help="Keep so many entries of the written text in each kv head on average, and evict "
            "the others while it is written.",
        ),
    ):
        with_text = option(with_text)
    return with_text
