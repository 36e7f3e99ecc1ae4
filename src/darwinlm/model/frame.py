"""The frame of a decoder, found by running it once on zeros: what is around its blocks, and what they are called with.

Nothing here knows a family.
"""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from darwinlm.model.family import Surroundings
from darwinlm.types import UsageError

LENGTH = 4  # tokens


@dataclass(frozen=True)
class Frame(Surroundings):
    """What a decoder has around its blocks, and what it calls them with.

    Attributes:
        calls: what each block is called with beside the hidden states, by the names of its arguments.
    """

    calls: tuple[dict[str, Any], ...]


def find_frame(model: PreTrainedModel) -> Frame:
    """Run a model's decoder on zeros, with recorders in place of its blocks. The model may be on the meta device.

    Raises:
        UsageError: if it has no list of blocks that are called in turn, each with hidden states and arguments that have
            names, or no one final norm after them.
    """
    paths = {module: path for path, module in model.named_modules()}
    name, decoder = type(model).__name__, model.get_decoder()
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [(path, m) for path, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists or not paths.get(decoder):
        raise UsageError(
            f"cannot prune {name}: expected a decoder with a list of {count} blocks, found none; "
            "darwinlm prunes models of one decoder"
        )
    inner, blocks = lists[0]
    root = paths[decoder]
    recorders, after, uses, reason = _run(decoder, f"{root}.{inner}", blocks, returns_more=False)
    returns_more = bool(reason) or any(recorder.wrong for recorder in recorders)
    if returns_more:
        recorders, after, uses, reason = _run(decoder, f"{root}.{inner}", blocks, returns_more)
    if reason:
        raise UsageError(f"cannot prune {name}: its decoder cannot be run block by block ({reason})")
    for index, recorder in enumerate(recorders):
        if len(recorder.calls) != 1:
            raise UsageError(
                f"cannot prune {root}.{inner}.{index}: expected a block that runs once for each token, found "
                f"{len(recorder.calls)} runs; darwinlm prunes models whose blocks run in turn"
            )
    if len(after) != 1:
        raise UsageError(
            f"cannot prune {name}: expected one final norm after its blocks, found {', '.join(after) or 'none'}"
        )
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    lookups = (f"{root}.{path}" for path in uses.lookups)
    return Frame(
        backbone=root,
        embedding=paths[embedding],
        blocks=f"{root}.{inner}",
        final_norm=f"{root}.{after[0]}",
        output_embedding=paths.get(output, "") if output is not None else "",
        returns_more=returns_more,
        calls=tuple(recorder.calls[0] for recorder in recorders),
        given=frozenset(name for recorder in recorders for name, each in recorder.calls[0].items() if uses.knows(each)),
        lookups=tuple(path for path in lookups if path != paths[embedding]),
    )


def _run(
    decoder: nn.Module, path: str, blocks: nn.ModuleList, returns_more: bool
) -> tuple[list[Recorder], list[str], _Uses, str]:
    """Run a decoder on zeros with recorders.

    Returns:
        The recorders, the modules that ran after them, what became of the token ids, and why it failed.
    """
    recorders = [Recorder(f"{path}.{index}", block, returns_more) for index, block in enumerate(blocks)]
    memo: dict[int, Any] = {id(blocks): nn.ModuleList(recorders)}
    for parameter in set(decoder.parameters()) - set(blocks.parameters()):
        memo[id(parameter)] = nn.Parameter(_zeros(parameter), requires_grad=False)
    memo |= {id(buffer): _zeros(buffer) for buffer in decoder.buffers() if buffer.is_meta}
    copied: Any = copy.deepcopy(decoder, memo).cpu().eval()
    after: list[str] = []
    for name, module in copied.named_children():
        module.register_forward_hook(partial(_note_after, name, recorders, after))
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    uses = _Uses(ids, copied)
    try:
        with torch.no_grad(), torch.device("cpu"), uses:
            copied(input_ids=ids, use_cache=False)
    except UsageError:
        raise
    except Exception as error:
        return recorders, after, uses, (str(error).splitlines() or [type(error).__name__])[0]
    return recorders, after, uses, ""


class _Uses(TorchDispatchMode):
    """Follows token ids: what is computed of them, and the embeddings that look them up."""

    def __init__(self, ids: Tensor, decoder: nn.Module):
        super().__init__()
        self.known = {id(ids): ids}  # with the tensor, whose id lives no longer than it does
        self.lookups: list[str] = []
        for path, module in decoder.named_modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(partial(self._look_up, path))

    def knows(self, value: Any) -> bool:
        """Whether a value depends on what the tokens are."""
        return any(id(tensor) in self.known for tensor in tree_leaves(value))

    def _look_up(self, path: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self.knows(args):
            self.lookups.append(path)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = str(func)
        of_shape_alone = name.startswith("aten.new_") or "_like." in name
        if not of_shape_alone and self.knows((args, kwargs)):
            self.known |= {id(tensor): tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor)}
        return output


def by_name(block: nn.Module, unnamed: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """What a block is called with beside the hidden states, by the names of its arguments."""
    names = list(inspect.signature(block.forward).parameters)[1:]
    return dict(zip(names, unnamed, strict=False)) | dict(named)


def is_handed_on(value: Any) -> bool:
    """Whether an argument is that in which blocks hand on what later ones read, such as keys and values."""
    return isinstance(value, UserDict)


def _zeros(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape, which take no memory."""
    return torch.zeros((), dtype=like.dtype, device="cpu").expand(like.shape)


class Recorder(nn.Module):
    """Takes the place of a block: records how it is called, and returns the hidden states unchanged."""

    def __init__(self, path: str, block: nn.Module, returns_more: bool):
        super().__init__()
        self.path = path
        self.returns_more = returns_more
        self.wrong = False  # whether it was given what is no hidden states, but one sequence of them
        self.block = [block]  # in a list, so that it is no submodule
        self.calls: list[dict[str, Any]] = []
        self.states: Tensor | None = None  # of the last call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self

    def forward(self, *unnamed: Any, **arguments: Any) -> Any:
        if not unnamed or not isinstance(unnamed[0], Tensor):
            raise UsageError(
                f"cannot prune {self.path}: expected a block that takes hidden states first, found "
                f"{type(unnamed[0]).__name__ if unnamed else 'none'}; convert the model to another family"
            )
        states, *others = unnamed
        self.states, self.wrong = states, states.dim() != 3
        self.calls.append(by_name(self.block[0], others, arguments))
        return (states, None) if self.returns_more else states


def _note_after(path: str, recorders: list[Recorder], after: list[str], *_: Any) -> None:
    if recorders[-1].calls:
        after.append(path)
