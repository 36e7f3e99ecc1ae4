"""The code of exports of wrappers: classes of a family around a pruned language model of another.

`modeling_pruned_llava.py` is their only source, with the names replaced. It imports the code of the language model.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from darwinlm.model.layers import family_of, is_pruned
from darwinlm.model.pruned import (
    auto_map,
    import_module,
    is_text_family,
    module_name,
    pruned_classes,
    register,
    register_classes,
    render,
    stock_names,
)

TEMPLATE = Path(__file__).with_name("modeling_pruned_llava.py")
WHOLE = "AutoModelForImageTextToText"  # the Auto class that finds wrappers


def wrapper_auto_map(family: str) -> dict[str, str]:
    """As `auto_map`, of the wrappers of a family; as a causal language model they are found too."""
    names = _wrapper_names(family)
    return {auto: f"{module_name(family)}.Pruned{stock}" for auto, stock in names.items()}


def _wrapper_names(family: str) -> dict[str, Any]:
    names: dict[str, Any] = {"AutoConfig": CONFIG_MAPPING_NAMES[family], "AutoModel": MODEL_MAPPING_NAMES[family]}
    return names | dict.fromkeys((WHOLE, "AutoModelForCausalLM"), MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])


def render_wrapper(family: str, text_family: str) -> str:
    """Return the source of the Python module of a wrapper around a pruned language model of the family `text_family`.

    It imports that of the language model, which lies beside it.
    """
    text = TEMPLATE.read_text()
    names = {f"Llava{end}": end for end in ("Config", "Model", "ForConditionalGeneration")}
    stock = dict(zip(names, list(_wrapper_names(family).values())[:3], strict=True))
    inner = stock_names(text_family)
    stock |= {"LlamaConfig": inner["AutoConfig"], "LlamaModel": inner["AutoModel"]}
    for name, other in stock.items():
        text = re.sub(rf"(Pruned)?{name}\b", lambda match, other=other: f"{match[1] or ''}<{other}>", text)
    for name, other in (
        ("Llava", stock["LlavaConfig"].removesuffix("Config")),
        ("llava", family),
        ("llama", text_family),
    ):
        text = text.replace(name, other)
    return re.sub(r"<(\w+)>", r"\1", text)


@cache
def wrapper_classes(family: str, text_family: str) -> dict[str, Any]:
    """As `pruned_classes`, of the wrappers of a family around language models of another."""
    pruned_classes(text_family)  # whose module this one imports
    module = import_module(family, render_wrapper(family, text_family))
    return {auto: getattr(module, f"Pruned{stock}") for auto, stock in _wrapper_names(family).items()}


def wrapper_class(config: PreTrainedConfig) -> Any:
    """Return the class of the whole model that this is the config of, a language model in another."""
    if is_pruned(config):
        return wrapper_classes(family_of(config), family_of(config.text_config))[WHOLE]
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]


def register_wrapper(family: str, text_family: str) -> None:
    """Register the pruned wrappers of a family, in place of those around language models of another family."""
    register(text_family)
    register_classes(wrapper_classes(family, text_family))


def foreign_code(directory: Path) -> str | None:
    """Return a file in an export that has or names Python code that is not this package's, or None if there is none.

    Whoever trusts the code of the export runs only what was compared here.
    """
    causal = {family for family in MODEL_MAPPING_NAMES if is_text_family(family)}
    wrappers = MODEL_MAPPING_NAMES.keys() & MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    code = [(file.stem.removeprefix(module_name("")), file) for file in sorted(directory.rglob("*.py"))]
    inner = [family for family, _ in code if family in causal]
    for family, file in code:
        ours = [render(family)] if family in causal else []
        ours += [render_wrapper(family, text) for text in inner] if family in wrappers else []
        if file.name != f"{module_name(family)}.py" or file.read_text(errors="replace") not in ours:
            return file.name
    known = [auto_map(family) for family in causal] + [wrapper_auto_map(family) for family in wrappers]
    for file in sorted(directory.glob("*.json")):
        named = _find_auto_map(file)
        if named is not None and named not in known:
            return file.name
    return None


def _find_auto_map(file: Path) -> Any:
    """Return where a file of JSON says that code is, None if it does not."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return None
    return content.get("auto_map") if isinstance(content, dict) else None
