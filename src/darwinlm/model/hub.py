"""Models on the Hugging Face hub, of which exactly the files that are used are fetched, into the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from darwinlm.model.licence import LICENCE_PATTERNS
from darwinlm.model.shards import INDEX, WEIGHTS, read_index
from darwinlm.runtime.names import HubName
from darwinlm.types import UsageError

# What the hub's client raises where something is not there or cannot be reached.
HUB_ERRORS = (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError)


# A low-rank adapter, as PEFT names its files.
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


_CONFIGS = ("config.json", INDEX, ADAPTER_CONFIG)


_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


# How images, sound and the like become the inputs of a model that holds a language model beside others.
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


# What describes a model beside its config and its weights; the card names the licence, which an export carries on.
CARRIED = ("generation_config.json", "README.md", *_TOKENIZERS, *PROCESSORS, *LICENCE_PATTERNS)


def fetch_model(name: HubName) -> Path:
    """Fetch a model from the hub, and return its directory in the hub's cache.

    Its config, tokenizer, licence and card are fetched, and the safetensors files that its index names, or the only
    one: no copies of the weights in other formats. What is in the cache is not fetched again, and an interrupted
    download goes on. Without a network, a model that is in the cache whole is found there.

    Raises:
        UsageError: if the model has no safetensors files.
        HUB_ERRORS: if it cannot be had.
    """

    def fetch(*files: str) -> Path:
        return Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=list(files)))

    directory = fetch(*_CONFIGS, *CARRIED)
    shards = read_index(directory)
    if (directory / "config.json").exists() or not (directory / ADAPTER_CONFIG).exists():
        weights = [WEIGHTS] if shards is None else sorted(set(shards.values()))
    else:
        weights = [ADAPTER]
    directory = fetch(*weights)
    missing = [file for file in weights if not (directory / file).exists()]
    if missing:
        raise UsageError(
            f"no weights of {name.repository} on the hub: expected {missing[0]}, found none; name a model with it"
        )
    return directory
