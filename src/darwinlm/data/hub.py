"""Data sets on the Hugging Face hub, by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from darwinlm.runtime.names import HubName, hub_name
from darwinlm.types import UsageError

if TYPE_CHECKING:
    from datasets import IterableDataset

# Data sets with a name of their own.
ALIASES = {
    "fineweb-edu": HubName("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"),
    "fineweb-edu-100bt": HubName("HuggingFaceFW/fineweb-edu", "sample-100BT", "train"),  # for billions of tokens
    "wikitext2": HubName("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "c4": HubName("allenai/c4", "en", "train"),
    # For evaluation only.
    "wikitext2-test": HubName("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4-validation": HubName("allenai/c4", "en", "validation"),
}

# Where the hub keeps the data files, as parquet, of data sets that are a script, which datasets 5 does not run.
CONVERTED = "refs/convert/parquet"
GRAMMAR = "NAME, NAME:CONFIG, NAME:CONFIG:SPLIT or NAME::SPLIT, each with @REVISION or without"


def dataset_named(source: str) -> HubName:
    """The data set that a source means: one of `ALIASES`, or a name on the hub in the form `GRAMMAR`.

    Raises:
        UsageError: if it has another form.
    """
    name = hub_name(source)
    if name is None:
        raise UsageError(f"no text at {source}: expected a file or a data set of the hub ({GRAMMAR}); check the name")
    alias = ALIASES.get(name.repository, name)
    return HubName(alias.repository, name.config or alias.config, name.split or alias.split or "train", name.revision)


def stream_dataset(source: str) -> IterableDataset:
    """The records of a data set of the hub, as a stream.

    Raises:
        UsageError: as `dataset_named`, or if the data set is a script whose data files the hub has not converted.
        DatasetNotFoundError, OSError, ValueError: from `datasets.load_dataset`.
    """
    from datasets import load_dataset  # slow to import, and files do not need it

    name = dataset_named(source)
    options = {"name": name.config, "split": name.split, "streaming": True}
    try:
        return load_dataset(name.repository, revision=name.revision, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        try:
            return load_dataset(name.repository, revision=CONVERTED, **options)
        except (OSError, ValueError):
            raise UsageError(
                f"the data set {name.repository} is a script, which datasets 5 does not run, and the hub has no "
                "converted copy of it: expected data files; download them and name these"
            ) from None
