"""Models that hold a language model beside others, such as a vision tower, and the language model in them.

Everything but the export sees the language model alone, as a causal model of its own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from darwinlm.model.layers import family_of
from darwinlm.model.naming import own_names
from darwinlm.model.pruned import FIRST_KEPT, complete_family, is_text_family
from darwinlm.model.shards import Header
from darwinlm.model.wrapper_code import wrapper_class
from darwinlm.runtime.understood import understood
from darwinlm.types import UsageError

WRAPPED = "text_config"  # the field of a wrapper's config that describes the language model in it
LOGITS = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}  # fields, and that change nothing


def is_wrapper(config: PretrainedConfig) -> bool:
    """Whether a config describes a language model in another model."""
    return isinstance(getattr(config, WRAPPED, None), PretrainedConfig)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model in a wrapper, as that of a model of its own; of any other model, its config.

    Raises:
        UsageError: if the language model is none that transformers has as a model of its own.
    """
    if not is_wrapper(config):
        return config
    text = copy.deepcopy(getattr(config, WRAPPED))
    if not is_text_family(family_of(text)):
        raise UsageError(
            f"unsupported model family {family_of(config)!r}: expected a language model of transformers in it, "
            f"found {family_of(text)!r}; convert the model to another family"
        )
    complete_family(family_of(text))
    layers = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)
    if layers:  # what these layers of a vision tower see is added behind the first blocks
        setattr(text, FIRST_KEPT, len(layers))
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    text.dtype = text.dtype or config.dtype
    for name in LOGITS.keys() & vars(text).keys():
        if name not in inspect.getsource(inspect.unwrap(wrapper_class(config).forward)):  # the whole does not heed it
            setattr(text, name, LOGITS[name])
    if getattr(config, "quantization_config", None):
        text.quantization_config = config.quantization_config
    return text


def empty_wrapper(config: PretrainedConfig) -> PreTrainedModel:
    """A wrapper without its weights. Raises `UsageError` if it cannot be built."""
    with understood(f"no {family_of(config)} can be built from its config.json", "install what it needs"):
        with init_empty_weights(), no_init_weights():
            model: PreTrainedModel = wrapper_class(config)(copy.deepcopy(config))
        model.tie_weights()
        return model.eval()


def text_paths(wrapper: PreTrainedModel, text: PreTrainedModel) -> dict[str, str]:
    """The paths of a language model's decoder and output embedding, by those in the wrapper that holds it."""
    pairs = [(wrapper.get_decoder(), text.get_decoder())]
    pairs += [(wrapper.get_output_embeddings(), text.get_output_embeddings())]
    inner = {module: path for model in (wrapper, text) for path, module in model.named_modules()}
    return {inner[outside]: inner[inside] for outside, inside in pairs}


def split_headers(
    wrapper: PreTrainedModel, text: PreTrainedModel, headers: Mapping[str, Header]
) -> tuple[dict[str, Header], dict[str, Header]]:
    """What a wrapper's checkpoint holds of its language model, by the names in `text`, and what it holds beside.

    A tensor that the wrapper has no place for counts as one of the language model, which has none either.

    Args:
        wrapper, text: without weights.
    """
    paths, known = text_paths(wrapper, text), {*wrapper.state_dict()}
    inside: dict[str, Header] = {}
    beside: dict[str, Header] = {}
    for name, header in own_names(wrapper, headers).items():
        place = next((path for path in paths if name.startswith(f"{path}.")), None)
        if place is not None:
            inside[paths[place] + name.removeprefix(place)] = header
        else:
            (beside if name in known else inside)[name] = header
    return inside, beside
