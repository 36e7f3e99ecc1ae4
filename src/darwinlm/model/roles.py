"""The roles of a decoder's modules, derived from what flows where: projections, heads, norms and MLP of every block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from darwinlm.model.family import Family, Fused, Surroundings
from darwinlm.model.flow import (
    ATTENDED,
    GIVEN,
    HANDED_ON,
    STREAM,
    Flow,
    Marks,
    head_numbers,
    is_selection,
    trace,
)
from darwinlm.model.frame import Frame, find_frame, is_handed_on
from darwinlm.types import UsageError


def find_roles(model: PreTrainedModel, fused: Fused | None) -> Family:
    """Derive where a model keeps its units. The model may be on the meta device.

    Args:
        fused: how the rows of a fused projection lie, which no flow shows; None if the family has none.

    Raises:
        UsageError: if a module fits no role; it names the module.
    """
    frame = find_frame(model)
    blocks: Any = model.get_submodule(frame.blocks)
    found: list[_Found] = []
    seen: set[nn.Parameter] = set()
    handed: dict[str, Any] = {}
    for index, block in enumerate(blocks):
        path = frame.block(index)
        if not seen.isdisjoint(block.parameters()):
            _refuse(path, "weights of its own", "those of a block before it")
        seen |= set(block.parameters())
        names = {name for name, _ in _weights(block)}
        hands_on = any(map(is_handed_on, frame.calls[index].values()))  # and must be run, for what others read of it
        if not hands_on and any(names <= other.names for other in found):
            continue
        roles = _Roles(path, block, _trace(path, model, frame, index, handed), fused)
        found.append(_Found(index, path, names, **roles.parts(), remains=roles.remains()))
        roles.check_rest()
    around = {each.name: getattr(frame, each.name) for each in fields(Surroundings)}
    return Family(**around, **_merge(frame.blocks, found))


# Of the fields of an attention, those that are others where a block has no projection of keys or of values.
OF_KEYS = ("key", "value", "projections", "head_norms")


@dataclass(frozen=True)
class _Found:
    """The roles of one block's modules.

    Attributes:
        names: the modules with weights that it has.
    """

    index: int
    path: str
    names: set[str]
    attention: dict[str, Any]
    mlp: dict[str, Any]
    mixer: dict[str, Any]
    remains: bool

    @property
    def projections(self) -> tuple[str, ...]:
        """Of query, key and value: fewer where values come from keys, or both from another block."""
        return self.attention.get("projections", ())

    def parts(self) -> list[dict[str, Any]]:
        """The fields of the units that the block has."""
        return [part for part in (self.attention, self.mlp, self.mixer) if part]


def _merge(blocks: str, found: Sequence[_Found]) -> dict[str, Any]:
    """The fields of a family, from blocks of which some lack a unit."""
    fields: dict[str, Any] = {}
    most: dict[str, int] = {}  # how many units the blocks have from which norms are
    owners: dict[str, str] = {}  # the role of each unit's module
    fullest = max(found, key=lambda other: len({*other.projections}))
    fields |= {name: fullest.attention[name] for name in OF_KEYS if name in fullest.attention}
    for each in sorted(found, key=lambda other: -len(other.parts())):  # a norm of two units shows where both are
        for part in each.parts():
            for name, value in part.items():
                richer = name.endswith("norms") and len(each.parts()) < most.setdefault(name, len(each.parts()))
                richer |= name in OF_KEYS and {*each.projections} < {*fullest.projections}
                if fields.setdefault(name, value) != value and not richer:
                    _refuse(each.path, f"as {name} {_named(fields[name])}, as in other blocks", _named(value))
        for name in ("attention", "mlp", "mixer"):
            path = getattr(each, name).get(name)
            if path and owners.setdefault(path, name) != name:
                _refuse(f"{each.path}.{path}", f"the {owners[path]}, as in another block", f"the {name}")
    if "attention" not in fields or "mlp" not in fields:
        _refuse(blocks, "an attention and an MLP in its blocks", "none")
    joint = tuple(each.index for each in found if len(each.projections) == 2)
    return fields | {"values_of_keys": joint, "remains": any(each.remains for each in found)}


def _named(value: Any) -> str:
    return (", ".join(value) if isinstance(value, tuple) else str(value)) or "none"


def _trace(path: str, model: PreTrainedModel, frame: Frame, index: int, handed: dict[str, Any]) -> Flow:
    block, call = model.get_submodule(path), frame.calls[index]
    for name, value in call.items():
        known = all(leaf is None or isinstance(leaf, Tensor | int | float | str) for leaf in tree_leaves(value))
        if not known and not is_handed_on(value):
            _refuse(path, "tensors and numbers as arguments", f"{name}, a {type(value).__name__}")
        if isinstance(value, dict | list):
            _refuse(path, "arguments that blocks do not share", f"{name}, a {type(value).__name__}")
    try:
        embedding: Any = model.get_input_embeddings()
        flow = trace(block, embedding.weight.shape[-1], call, frame.given, handed)
    except Exception as error:
        stacked = [name for name, weights in _weights(block) if any(each.dim() == 3 for each in weights)]
        if stacked:
            _refuse(f"{path}.{stacked[0]}", "a projection or a norm of an attention or an MLP", "weights of experts")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"cannot prune {path}: it cannot be run by itself ({reason})") from None
    returned = flow.values[""]
    if not isinstance(returned[0] if isinstance(returned, tuple) else returned, Tensor):
        _refuse(path, "a block that returns hidden states", f"a {type(returned).__name__}")
    return flow


class _Roles:
    """The roles of the modules of one block."""

    def __init__(self, path: str, block: nn.Module, flow: Flow, fused: Fused | None):
        self.path = path
        self.block = block
        self.flow = flow
        self.fused: Fused | None = fused
        self.claimed: set[str] = set()
        self.units: set[str] = set()  # the modules of units

    def parts(self) -> dict[str, dict[str, Any]]:
        """The fields of each unit of the block."""
        self.claim_given()
        attention, mixer = self.attention(), self.mixer()
        return {"attention": attention, "mixer": mixer, "mlp": self.mlp()}

    def claim_given(self) -> None:
        """Claim what the block computes of what it is given of each token, which stays whatever leaves."""
        for path in self.flow.readers(GIVEN):
            self.claimed |= {path, *self.flow.reads[path]} & self.flow.reads.keys()

    def remains(self) -> bool:
        """Whether the block still computes something without its units."""
        own = [*self.block.named_parameters(recurse=False), *self.block.named_buffers(recurse=False)]
        return bool(self.flow.readers(GIVEN) or own)

    def attention(self) -> dict[str, Any]:
        """The fields of the attention, none if the block has none."""
        flow, within = self.flow, self.flow.attention
        if within is None:
            return {}
        readers = sorted(flow.readers(ATTENDED))
        if not readers:
            self._refuse(within, "a projection that reads what attention gives", "none")
        output = readers[0]
        gate = self._gate(output)
        others = sorted({*readers[1:], *(flow.reads[output] - {ATTENDED, gate})})
        if others or not output.startswith(f"{within}."):
            self._refuse(output, f"one projection in {within} that reads attention alone", f"{[*others, output]}")
        self._linear(output)
        returned = flow.values[within]
        if not isinstance(returned, tuple) or len(returned) != 2:
            self._refuse(within, "an attention that returns states and weights", f"a {type(returned).__name__}")
        counts = flow.heads[0], flow.heads[1], flow.heads[1]
        names = ("query", "key", "value")
        inputs = zip(names, flow.inputs, counts, flow.head_widths, strict=True)
        own = [each for each in inputs if each[1] != {HANDED_ON}]
        producers = [self._producer(*each) for each in own]
        projections = [projection for projection, _, _ in producers]
        of_keys = len(own) == 3 and projections[0] != projections[1] == projections[2]  # as they are
        if len(set(projections)) < len(own) and not of_keys and (len(set(projections)) > 1 or self.fused is None):
            self._refuse(projections[0], "a projection of its own for query, key and value", "a fused one")
        if gate and gate != projections[0]:
            self._refuse(gate, "gates in the projection of the query", "another module")
        keys = self._key_value_heads(projections)
        foreign = sorted({*flow.biases} - flow.named[within])
        if foreign:
            self._refuse(within, f"what each head is given to be named, {foreign[0]}", "no such argument")
        self.claimed |= {output}
        self.units.add(within)
        module = self.block.get_submodule(within)
        query_counts, key_value_counts, query_widths = head_numbers(module, flow.heads[0] * flow.head_widths[0])
        return {
            "attention": within,
            **dict.fromkeys(names, ""),
            **{role: producer for (role, *_), (_, producer, _) in zip(own, producers, strict=True)},
            "gate": gate,
            "by_head": self.fused == "by head" and keys > 1,  # one KV head lies behind all query heads
            "attention_output": output,
            "attention_norms": (norms := self._norms(projections, output)),
            "projections": tuple(projections[:2] if of_keys else projections),
            "head_norms": tuple(norm for _, _, norm in producers[:2] if norm),
            "shared_norms": self._shared(projections, norms),
            "query_counts": query_counts,
            "key_value_counts": key_value_counts,
            "query_widths": query_widths,
            "biases": flow.biases,
            "attention_adds": self._adds(within, output),
        }

    def _gate(self, output: str) -> str:
        others = self.flow.reads[output] - {ATTENDED}
        return next(iter(others)) if self.fused == "gated by head" and len(others) == 1 else ""

    def _key_value_heads(self, projections: Sequence[str]) -> int:
        """How many KV heads there are, which an attention that is written out repeats before they are seen."""
        queries, keys = self.flow.heads
        if len(set(projections)) > 1 or self.fused is None:
            return keys
        return (self._linear(projections[0]).out_features // self.flow.head_widths[0] - queries) // 2

    def _producer(self, role: str, marks: Marks, heads: int, width: int) -> tuple[str, str, str]:
        """The projection that a role's heads come from, the module whose rows are selected with them, and the norm."""
        assert self.flow.attention is not None
        if len(marks) != 1 or not marks <= self.flow.reads.keys():
            self._refuse(self.flow.attention, f"a {role} from one projection", f"{sorted(marks) or 'none'}")
        (last,) = marks
        module = self.block.get_submodule(last)
        if isinstance(module, nn.Linear):
            if module.out_features != heads * width and self.fused is None:
                self._refuse(last, f"{heads} heads of width {width}", f"a width of {module.out_features}")
            self.claimed.add(last)
            return last, last, ""
        before = self.flow.reads[last]
        projection = next(iter(before))
        if len(before) != 1 or not before <= self.flow.reads.keys():
            self._refuse(last, "a linear module", type(module).__name__)
        self._linear(projection)
        seen, own = self.flow.widths[last], {parameter.numel() for parameter in module.parameters()}
        over_all = is_selection(module) or seen == heads * width != width
        if own != {seen} or not (over_all or seen == width):
            self._refuse(last, f"a norm over a head or over all {heads}", f"{type(module).__name__} over {seen}")
        self.claimed |= {last, projection}
        return projection, last if over_all else projection, last

    def mlp(self) -> dict[str, Any]:
        """The fields of the MLP, none if the block has none."""
        if not (linear := self._linears()):
            return {}
        flow, output = self.flow, self._mlp_output(linear)
        inputs = tuple(path for path in linear if path in flow.reads[output])
        others = sorted(flow.reads[output] - {*inputs})
        if others or not inputs:
            self._refuse(others[0] if others else output, f"an MLP whose inputs meet in {output}", "another module")
        self.claimed |= {*inputs, output}
        within = _common([*inputs, output])
        if within:
            self.units.add(within)
        rows = [self._linear(path).out_features for path in inputs]
        width = self._linear(output).in_features
        if rows == [2 * width]:
            if self.fused != "in order":
                self._refuse(inputs[0], "a projection of its own for the gate", "a fused one")
            fields = inputs * 2
        else:
            fields = inputs
        adds = bool(within) and self._adds(within, output)
        if not adds and within in flow.seconds:
            self._refuse(within, "an MLP that adds its second argument", "one that uses it otherwise")
        norms = self._norms(inputs, output)
        return {"mlp": within, "mlp_inputs": fields, "mlp_output": output, "mlp_norms": norms}

    def _adds(self, unit: str, output: str) -> bool:
        """Whether a unit adds its second argument, the stream, to its output."""
        rest, second = self.flow.sums[unit] - {output}, self.flow.seconds.get(unit)
        if STREAM in rest and rest != second:
            self._refuse(unit, "a unit that adds no stream but its second argument", "another sum")
        return bool(rest) and rest == second

    def _linears(self) -> list[str]:
        """The linear modules whose roles are not known yet, in the order of calls."""
        return [
            path for path in self.flow.reads
            if path not in self.claimed and isinstance(self.block.get_submodule(path), nn.Linear)
        ]  # fmt: skip

    def _mlp_output(self, linear: Sequence[str]) -> str:
        """The output of the MLP, which reads linear modules alone."""
        ends = [path for path in linear if not self.flow.readers(path) & {*linear}]
        outputs = [path for path in ends if self.flow.reads[path] and self.flow.reads[path] <= {*linear}]
        return (outputs or ends or [*linear])[-1]

    def mixer(self) -> dict[str, Any]:
        """The fields of what mixes tokens without attention, by a convolution at least; none if the block has none."""
        flow = self.flow
        convolutions = [path for path, module in self.block.named_modules() if isinstance(module, nn.Conv1d)]
        within = convolutions[0].partition(".")[0] if convolutions else ""
        inside = [path for path in flow.reads if path.startswith(f"{within}.")]
        linear = [path for path in self._linears() if path in inside]
        if not linear or self.claimed & {*inside} or not isinstance(flow.values[within], Tensor):
            return {}
        if any(flow.readers(path) - {*inside} for path in inside if path != linear[-1]):
            self._refuse(within, f"{linear[-1]} as the only output", "several")
        norms = self._norms([path for path in inside if flow.reads[path] - {*inside}], linear[-1])
        self.claimed |= {name for name, _ in _weights(self.block) if name.startswith(f"{within}.")}
        return {"mixer": within, "mixer_output": linear[-1], "mixer_norms": norms}

    def check_rest(self) -> None:
        """Refuse weights that no role explains: any within a unit, and matrices elsewhere in the block."""
        for name, parameters in _weights(self.block):
            inside = any(name.startswith(f"{unit}.") for unit in self.units)
            if name not in self.claimed and (inside or any(parameter.dim() > 1 for parameter in parameters)):
                self._refuse(name, "a projection or a norm of an attention or an MLP", "weights of another use")

    def _norms(self, inputs: Sequence[str], output: str) -> tuple[str, ...]:
        """The norms that only this unit reads, and those that read only it and give zero for zero."""
        before = frozenset().union(*(self.flow.reads[path] for path in inputs)) - {STREAM}
        norms = [
            path for path in before
            if path not in self.flow.output and self.flow.readers(path) <= set(inputs) and self._is_norm(path)
        ]  # fmt: skip
        for path, marks in self.flow.reads.items():
            unbiased = getattr(self.block.get_submodule(path), "bias", None) is None
            if marks == {output} and self._is_norm(path) and unbiased:
                norms.append(path)
        self.claimed |= set(norms)
        return tuple(norms)

    def _shared(self, inputs: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
        """The norms that a unit reads and others too."""
        before = frozenset().union(*(self.flow.reads[path] for path in inputs)) - {STREAM, *own}
        return tuple(sorted(path for path in before if self._is_norm(path)))

    def _is_norm(self, path: str) -> bool:
        module = self.block.get_submodule(path)
        return not isinstance(module, nn.Linear) and all(parameter.dim() == 1 for parameter in module.parameters())

    def _linear(self, path: str) -> nn.Linear:
        module = self.block.get_submodule(path)
        if not isinstance(module, nn.Linear):
            self._refuse(path, "a linear module", type(module).__name__)
        return module

    def _refuse(self, path: str, expected: str, found: str) -> NoReturn:
        _refuse(f"{self.path}.{path}", expected, found)


def _refuse(path: str, expected: str, found: str) -> NoReturn:
    raise UsageError(f"cannot prune {path}: expected {expected}, found {found}; convert the model to another family")


def _weights(block: nn.Module) -> Iterable[tuple[str, list[nn.Parameter]]]:
    """The modules that hold weights themselves, and the weights that lie beside modules, by path."""
    for path, module in block.named_modules():
        if is_selection(block.get_submodule(path.rpartition(".")[0])):
            continue
        if is_selection(module) and any(True for _ in module.parameters()):
            yield path, list(module.parameters())
        own = [(name, parameter) for name, parameter in module.named_parameters(recurse=False) if parameter.numel() > 1]
        if any(True for child in module.children() for _ in child.parameters()):
            yield from ((f"{path}.{name}".lstrip("."), [parameter]) for name, parameter in own)
        elif own:
            yield path, [parameter for _, parameter in own]


def _common(paths: Sequence[str]) -> str:
    """The module in which all these paths are."""
    parts = [path.split(".")[:-1] for path in paths]
    shared = 0
    while all(len(part) > shared and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ".".join(parts[0][:shared])
