"""Files that a library reads: whatever it stumbles over in one becomes a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from darwinlm.types import DarwinError, UsageError


@contextmanager
def understood(what: str, cure: str) -> Iterator[None]:
    """Turn whatever a library stumbles over in a file into one sentence.

    Args:
        what: the sentence's beginning, such as `DIRECTORY has no usable tokenizer`.
        cure: what to do.

    Raises:
        UsageError: if anything but a `DarwinError` or too little memory was raised.
    """
    try:
        yield
    except (DarwinError, MemoryError):
        raise
    except BaseException as error:
        # The Rust of tokenizers panics with an exception of its own kind.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{what} ({reason}); {cure}") from None
