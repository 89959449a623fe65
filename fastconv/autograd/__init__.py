"""PyTorch's operators and their gradients on fastconv's kernels."""

from __future__ import annotations

from fastconv.autotune import Tuned
from fastconv.autotune.choose import Question, install_measurer


def _measure(question: Question) -> Tuned | None:
    # Imported only when a user asks to measure (`settings.tune`): no other call does.
    from fastconv import __version__
    from fastconv.measuring.first import measure

    return measure(question, __version__)


install_measurer(_measure)
