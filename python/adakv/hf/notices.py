"""What a :class:`adakv.Cache` says to whoever reads its log."""

from __future__ import annotations

import logging

_logger = logging.getLogger("adakv")


class Notices:
    """Warnings, each of them once a prompt."""

    def __init__(self) -> None:
        self._has_warned = False  # that there are no attention weights
        self._may_be_guesses = False  # several tokens after the prompt

    def of_attentions(self) -> None:
        """Steps were asked for attention weights, and give none."""
        if not self._has_warned:
            _logger.warning(
                "output_attentions: only prompts have attention weights; tokens after them attend "
                "to what each head kept, and give none"
            )
        self._has_warned = True

    def of_guesses(self) -> None:
        """Tokens may be taken back, as assisted decoding does: nothing to say."""
        self._may_be_guesses = True

    def of_a_second_turn(self, columns: int, num_forwards: int) -> None:
        """So many more tokens come after some forwards."""
        if columns > 1 and num_forwards == 1 and not self._may_be_guesses:
            _logger.warning(
                "%d more tokens right after the prompt are taken for a second turn and are not "
                "compressed; if they are of the prompt, give Cache(chunked_prefill=True)",
                columns,
            )

    def of_no_full_attention(self) -> None:
        """The model has no layer to compress."""
        _logger.warning("no layer of the model has full attention: nothing to compress")
