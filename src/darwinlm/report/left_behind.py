"""Which parts of a mixture of texts a model was made worse on than on the others."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

FAR = 2.0  # times the KL that the other parts have on average


def left_behind(kl: Mapping[str, float], reference: Mapping[str, float], what: str) -> list[str]:
    """A sentence for each part whose KL is above a reference's, or far above that of the other parts.

    Args:
        kl: by part, in nats a token.
        reference: the same of a model that none should be worse than.
        what: that model, as people call it.
    """
    sentences = []
    for part, own in kl.items():
        others = [value for name, value in kl.items() if name != part]
        if own > reference[part]:
            sentences.append(f"{part} is left behind: its KL is {own:.3f}, where {what} has {reference[part]:.3f}")
        elif others and own > FAR * mean(others):
            sentences.append(
                f"{part} is left behind: its KL is {own:.3f}, where the other parts have {mean(others):.3f} on average"
            )
    return [f"{sentence}; give it more weight in --data, or more tokens" for sentence in sentences]
