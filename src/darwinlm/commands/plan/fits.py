"""Which stage of a plan is the first that a machine has no room for, and the settings by which it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from darwinlm.commands.plan.devices import Machine
from darwinlm.commands.plan.stages import Stage, stages_of
from darwinlm.config.training import GradualConfig
from darwinlm.report import tables

Change = Callable[[GradualConfig], GradualConfig]


def _untrained(config: GradualConfig) -> GradualConfig:
    stages = tuple(replace(stage, training_tokens=0) for stage in config.search.stages)
    return replace(config, search=replace(config.search, stages=stages))


# Settings that make a stage smaller, in the order in which they are tried.
SMALLER: dict[str, dict[str, Change]] = {
    "calibration": {
        "--calibration.batch-size 1": lambda config: replace(
            config, calibration=replace(config.calibration, batch_size=1)
        ),
    },
    "search": {
        "--search.trains consumers": lambda config: replace(config, search=replace(config.search, trains="consumers")),
        "--search.stages without training_tokens": _untrained,
    },
    "refit": {
        "--refit.tokens 0": lambda config: replace(config, refit=replace(config.refit, tokens=0)),
    },
    "training": {
        "--training.fsdp true": lambda config: replace(config, training=replace(config.training, fsdp=True)),
        "--training.gradient-checkpointing true": lambda config: replace(
            config, training=replace(config.training, gradient_checkpointing=True)
        ),
        "--distillation.top-k 64": lambda config: replace(config, distillation=replace(config.distillation, top_k=64)),
    },
}


@dataclass(frozen=True)
class Misfit:
    """The first stage that a machine has no room for.

    Attributes:
        needed: the bytes of the device that it needs, or of the host's memory where there is no GPU.
        settings: that make it fit, or none if nothing does but another device.
    """

    stage: Stage
    needed: int
    settings: tuple[str, ...]


def first_misfit(
    model: PretrainedConfig, config: GradualConfig, machine: Machine, stages: list[Stage]
) -> Misfit | None:
    """Return the first of a recipe's stages that does not fit the machine, with the first settings by which it does."""
    misfit = next((stage for stage in stages if _needed(stage, machine) > machine.limit), None)
    if misfit is None:
        return None
    for flags in _tries(misfit.kind):
        smaller = config
        for flag in flags:
            smaller = SMALLER[misfit.kind][flag](smaller)
        again = [stage for stage in stages_of(model, smaller, machine) if stage.kind == misfit.kind]
        if all(_needed(stage, machine) <= machine.limit for stage in again):
            return Misfit(misfit, _needed(misfit, machine), flags)
    return Misfit(misfit, _needed(misfit, machine), ())


def _tries(kind: str) -> list[tuple[str, ...]]:
    """Each setting alone, and then one on top of those before it."""
    flags = tuple(SMALLER.get(kind, {}))
    return [*((flag,) for flag in flags), *(flags[:count] for count in range(2, len(flags) + 1))]


def _needed(stage: Stage, machine: Machine) -> int:
    return stage.device if machine.gpu else stage.host


def summary(misfit: Misfit | None, machine: Machine) -> str:
    """Say in one sentence whether everything fits, and if not, what does not and what to do."""
    where = "each device" if machine.gpu else "memory"
    if misfit is None:
        return f"every stage fits the {tables.size(machine.limit)} of {where} that may be used"
    cure = " and ".join(misfit.settings) if misfit.settings else "a device with more memory, or more of them"
    return (
        f"the first stage that does not fit is {misfit.stage.name}: it takes {tables.size(misfit.needed)} of {where}, "
        f"and {tables.size(machine.limit)} may be used; take {cure}"
    )
