"""A teacher's likeliest tokens on disk: written once for a set of sequences, and read by any number of trainings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from darwinlm.data.mapped import mapped
from darwinlm.data.stream import Sequences
from darwinlm.losses.distillation import Target, TopKTarget, teacher_target
from darwinlm.runtime import parallel
from darwinlm.runtime.files import read_record, sweep, write_record, write_tensors
from darwinlm.runtime.progress import track

ROWS = 16  # sequences in a file
LOGIT_BYTES = 6  # for each of the K tokens at a position: an int32 index and a float16 value
MANIFEST = "logits.json"


@dataclass(frozen=True)
class TeacherLogits:
    """Top-K log-probabilities of one teacher at one temperature, with a file for every `ROWS` rows of a part of tokens.

    A file is named after the token store, lane and part of its sequences, so that it serves trainings of any length,
    order and seed. It takes `LOGIT_BYTES` for each of the K tokens at every position.
    """

    path: Path
    provenance: dict[str, Any]

    @classmethod
    def open(
        cls, cache: Path, teacher_fingerprint: str, top_k: int, temperature: float, vocabulary: int
    ) -> TeacherLogits:
        """Return a teacher's logits in a cache directory, with the files that earlier trainings have written.

        Args:
            vocabulary: the number of tokens among which the teacher chooses.
        """
        provenance = {
            "teacher": teacher_fingerprint,
            "top_k": top_k,
            "temperature": temperature,
            "vocabulary": vocabulary,
        }
        key = hashlib.sha256(json.dumps(provenance).encode()).hexdigest()[:16]
        return cls(cache / f"logits-{key}", provenance)

    def fill(self, sequences: Sequences, load_teacher: Callable[[], PreTrainedModel]) -> None:
        """Write the files that are missing for some sequences; all processes call it together and share the work.

        Args:
            load_teacher: loads the teacher; it is called only if a file is missing.
        """
        with parallel.shared_directory(self.path, self._prepare):
            self._fill(sequences, load_teacher)

    def _prepare(self) -> None:
        sweep(self.path)
        manifest = self.path / MANIFEST
        if manifest.exists():
            read_record(manifest)  # refuses one of another format version
        else:
            write_record(manifest, {}, self.provenance)

    def _fill(self, sequences: Sequences, load_teacher: Callable[[], PreTrainedModel]) -> None:
        rows: dict[tuple[int, ...], int] = {}  # how many rows of each file are needed
        for store, lane, part, row in sequences.places.tolist():
            group = (store, lane, part, row // ROWS)
            rows[group] = max(rows.get(group, 0), row % ROWS + 1)
        missing = [(group, count) for group, count in sorted(rows.items()) if self._count(sequences, group) < count]
        parallel.wait_for_all()  # every process has looked before the first one writes
        mine = missing[parallel.rank() :: parallel.processes()]
        teacher = load_teacher() if mine else None
        for group, count in track(mine, "teacher's logits", len(mine)):
            store, lane, part, number = group
            first = number * ROWS
            ids = torch.stack([sequences.stores[store].read(lane, part, first + i) for i in range(count)])
            assert teacher is not None
            write_tensors(self._file(sequences, group), self._top_k(teacher, ids), self.provenance)
        parallel.wait_for_all()

    def _count(self, sequences: Sequences, group: tuple[int, ...]) -> int:
        """The number of rows in a file: an earlier training may have needed fewer than this one."""
        file = self._file(sequences, group)
        return mapped(file).get_slice("values").get_shape()[0] if file.exists() else 0

    def _file(self, sequences: Sequences, group: tuple[int, ...]) -> Path:
        store, lane, part, number = group
        return self.path / sequences.stores[store].path.name / f"{lane:02d}-{part:05d}-{number:05d}.safetensors"

    def _top_k(self, teacher: PreTrainedModel, token_ids: Int[Tensor, "sequences length"]) -> dict[str, Tensor]:
        """Return `indices` and `values`, from one sequence at a time and the logits of a few tokens at a time."""
        parts: dict[str, list[Tensor]] = {"indices": [], "values": []}
        for ids in token_ids:
            temperature, vocabulary = self.provenance["temperature"], self.provenance["vocabulary"]
            target = teacher_target(teacher, ids[None].to(teacher.device), temperature, vocabulary)
            values, indices = target.top_k(self.provenance["top_k"])
            parts["indices"].append(indices.to("cpu", torch.int32))
            parts["values"].append(values.to("cpu", torch.float16))
        return {name: torch.stack(tensors) for name, tensors in parts.items()}

    def read(self, sequences: Sequences, index: int) -> dict[str, Tensor]:
        """Return `indices` and `values` after every token but the last of a sequence, each `[length - 1, top_k]`."""
        store, lane, part, row = sequences.places[index].tolist()
        file = mapped(self._file(sequences, (store, lane, part, row // ROWS)))
        return {name: file.get_slice(name)[row % ROWS] for name in ("indices", "values")}


@dataclass(frozen=True)
class TaughtSequences(Dataset):
    """Sequences with the teacher's log-probabilities for them."""

    sequences: Sequences
    logits: TeacherLogits

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.sequences[index] | self.logits.read(self.sequences, index)


class CachedTeacher:
    """A teacher whose top-K log-probabilities are part of the batch, at the temperature they were written for."""

    def target(self, batch: dict[str, Any], temperature: float) -> Target:
        """Return the distribution in the batch; `temperature` must be that of its files."""
        return TopKTarget(batch["indices"].flatten(0, 1), batch["values"].flatten(0, 1))
