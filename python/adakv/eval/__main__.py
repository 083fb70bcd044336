"""``python -m adakv.eval``: lm-eval's command line, where ``--model adakv`` is known."""

from __future__ import annotations

import sys


def main() -> None:
    """Hands over to lm-eval."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        sys.exit(f"adakv: {error.name} is missing; pip install 'adakv[hf,eval]'")

    import adakv.eval.lm  # noqa: F401  registers the model

    cli_evaluate()


if __name__ == "__main__":
    main()
