"""The model card of an export: what the model was pruned from, how, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

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


def trained_card(card: str, model: str, settings: Mapping[str, str], parameters: int) -> str:
    """The card of a model after training: that which it had before, or a new one, with the training added."""
    if not card.startswith("---"):
        card = f"# {Path(model).name}, trained\n\n{parameters:,} parameters, trained by darwinlm.\n"
    listed = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    return card.replace(UNTRAINED, TRAINED) + TRAINING.format(settings=listed)


def stubbed_card(card: str, parameters: int) -> str:
    """The card of a model with modules of zeros, which has `parameters` with these."""
    return card + STUBBED.format(parameters=parameters)


def model_card(model: str, settings: Mapping[str, str], dense_parameters: int, parameters: int, table: str = "") -> str:
    """The text of an export's README.md; `table` is what was measured of it, once it has been."""
    card = CARD.format(
        name=Path(model).name,
        lineage=f"base_model: {model}\n" if _is_hub_id(model) else "",
        share=parameters / dense_parameters,
        parameters=parameters,
        dense_parameters=dense_parameters,
        trained=UNTRAINED,
        settings="\n".join(f"- {name}: {value}" for name, value in settings.items()),
    )
    return card + MEASURED.format(table=table) if table else card


def _is_hub_id(model: str) -> bool:
    """Whether a hub could list the export below its parent: `owner/name`, and no path here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).exists()
