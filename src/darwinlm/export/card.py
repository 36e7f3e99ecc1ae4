"""The model card of an export: what the model was pruned from, how it was made, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from darwinlm.runtime.names import hub_model, short_name

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, structured-pruning, darwinlm]
{lineage}---

# {name}, pruned to {share:.0%}

{parameters:,} parameters, pruned by darwinlm from the {dense_parameters:,} of `{name}`. It is a dense model whose
blocks differ in heads and MLP width. Its licence and its limits are those of the original. {trained}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

`trust_remote_code` is for the one Python file beside the weights, which builds each block at its own size; without
that file all blocks are alike, and it is not needed. The tokenizer has no code, but reads the model's config first.
`darwinlm.load("PATH")` never needs it.

## How it was made

{settings}

Method: DarwinLM, evolutionary structured pruning of large language models (Tang et al., 2025, arXiv 2502.07780).
"""
MEASURED = """
## How good it was after pruning

{table}
"""

AROUND = """
## What is around it

It is the language model of a model of several parts, of which only the language model was pruned; all the rest is that
of the original, and no number here counts it. Parameters and figures are those of the language model alone.
"""

UNTRAINED = "It was not trained\nafter pruning."
TRAINED = "It was trained\nafter pruning."
TRAINING = """
## How it was trained

{settings}
"""
STUBBED = """
## For vLLM

Where a block lost its attention or its MLP there is a small one of zeros here, which vLLM asks for and which changes no
output: {parameters:,} parameters with these.
"""


ANYMODEL = """
## For vLLM's AnyModel

This directory has the form that is [proposed](https://github.com/vllm-project/vllm/pull/36512) for layers of different
sizes; transformers does not load it.
"""


def trained_card(card: str, model: str, settings: Mapping[str, str], parameters: int) -> str:
    """Return the card of a model after training.

    Args:
        card: the card before training, to which the training is added; a text that is no model card is replaced.
        model: name or path of the model, for a new card.
        settings: the settings of the training, by name.
        parameters: the number of parameters, for a new card.
    """
    if not card.startswith("---"):
        card = f"# {short_name(model)}, trained\n\n{parameters:,} parameters, trained by darwinlm.\n"
    listed = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    return card.replace(UNTRAINED, TRAINED) + TRAINING.format(settings=listed)


def wrapper_card(card: str) -> str:
    """Return a card that says how to load the whole model around a pruned language model."""
    whole = card.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
    whole = whole.replace("pipeline_tag: text-generation", "pipeline_tag: image-text-to-text")
    return whole if AROUND in whole else whole + AROUND


def model_card(
    model: str,
    licence: Mapping[str, str],
    settings: Mapping[str, str],
    dense_parameters: int,
    parameters: int,
    table: str = "",
) -> str:
    """Return the text of an export's README.md.

    Args:
        model: name or path of the dense model.
        licence: what the card of the dense model says of its licence, by field.
        settings: the settings of the pruning, by name.
        dense_parameters, parameters: the numbers of parameters of the dense model and of the export.
        table: the measured figures as Markdown; if empty, the card has no section for them.
    """
    on_hub = hub_model(model)
    lineage = {**licence, **({"base_model": on_hub.repository} if on_hub else {})}
    card = CARD.format(
        name=short_name(model),
        lineage="".join(f"{field}: {json.dumps(value)}\n" for field, value in lineage.items()),
        share=parameters / dense_parameters,
        parameters=parameters,
        dense_parameters=dense_parameters,
        trained=UNTRAINED,
        settings="\n".join(f"- {name}: {value}" for name, value in settings.items()),
    )
    return card + MEASURED.format(table=table) if table else card
