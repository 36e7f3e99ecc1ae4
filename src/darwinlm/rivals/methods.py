"""The registry of allocators: a row of `METHODS` for each, which `darwinlm compare --methods` offers by its name.

Importing it imports no allocator, so that the command line can list them without waiting for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from darwinlm.rivals.problem import Allocator


@dataclass(frozen=True)
class Method:
    """An allocator that can be compared with others.

    Attributes:
        function: `module:name` under `darwinlm.rivals`, of type `Allocator`.
        summary: what decides its choice, for the help of the command line.
        ours: whether it is a search of this package, which scores genomes on text that is scrambled in part.
        trains: whether it trains weights or masks, which takes longer; it is then not run by default.
    """

    name: str
    function: str
    summary: str
    ours: bool = False
    trains: bool = False

    @property
    def allocate(self) -> Allocator:
        """The function that chooses a genome, imported when it is first asked for."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(f"darwinlm.rivals.{module}"), name)


METHODS = {
    method.name: method
    for method in (
        Method("uniform", "ours:uniform", "the same share of every unit"),
        Method("shortgpt", "shortgpt:shortgpt", "whole blocks whose input and output are most alike"),
        Method("cosine", "cosine:cosine", "consecutive blocks whose input and output are most alike"),
        Method("shortened-llama", "shortened_llama:shortened_llama", "whole blocks that perplexity needs least"),
        Method("shortened-llama-taylor", "shortened_llama:shortened_llama_taylor", "whole blocks of least saliency"),
        Method("evopress", "evopress:evopress", "whole attentions and MLPs, by an evolution"),
        Method("ziplm", "ziplm:ziplm", "levels of least summed error, by dynamic programming"),
        Method("evolution", "ours:evolution", "levels, by the search of darwinlm without training", ours=True),
        Method("sheared-llama", "sheared_llama:sheared_llama", "levels nearest to learned masks", trains=True),
        Method(
            "training-aware",
            "ours:training_aware",
            "levels, by the search of darwinlm with training before selection",
            ours=True,
            trains=True,
        ),
    )
}
DEFAULT_METHODS = tuple(method.name for method in METHODS.values() if not method.trains)
