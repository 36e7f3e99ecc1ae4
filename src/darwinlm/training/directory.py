"""The directory that a training writes, and its results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darwinlm.runtime.files import read_record
from darwinlm.runtime.seal import export_damage, first_change, seal_export
from darwinlm.types import DarwinError, UsageError

FINISHED = "darwinlm.json"  # written into a checkpoint once it is complete


class Training:
    """The directory that a training writes, and its results.

    Attributes:
        exported: the directory of the trained model, which `export_hf` writes.
        seal_path: the digests of the exported files.
        checkpoints: the directory of the checkpoints that a training can resume from.
        log_path: the history, with a line of JSON for each log and evaluation.
        result_path: the file of held-out figures before and after the training, which is written last.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.exported = self.path / "model"
        self.seal_path = self.path / "model.json"
        self.checkpoints = self.path / "checkpoints"
        self.log_path = self.path / "log.jsonl"
        self.result_path = self.path / "result.json"

    @property
    def history(self) -> list[dict[str, Any]]:
        """All lines of the log so far."""
        lines = self.log_path.read_text(encoding="utf-8").splitlines() if self.log_path.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def result(self) -> dict[str, Any]:
        """Held-out figures before and after the training. Raises `DarwinError` if it has not finished."""
        return read_record(self.result_path, "before", "after")

    def seal_export(self, provenance: Mapping[str, Any]) -> None:
        """Note what the files of the export hold, so that damage to them is found."""
        seal_export(self.exported, self.seal_path, provenance)

    def check_export(self) -> None:
        """Raise `DarwinError` if a file of the export, other than its model card, is not what was written."""
        damage = export_damage(self.exported, self.seal_path)
        if damage is not None:
            raise DarwinError(
                f"the model in {self.exported} is damaged: expected the {damage} that the training wrote, found "
                f"another or none; delete {self.exported} and {self.result_path}, and run darwinlm train again"
            )

    def last_checkpoint(self, provenance: Mapping[str, Any]) -> Path | None:
        """Return the newest complete checkpoint, or None. Raises `UsageError` if it is of another training."""
        complete = {
            int(match[1]): file
            for file in self.checkpoints.glob(f"*/{FINISHED}")
            if (match := re.fullmatch(r"checkpoint-(\d+)", file.parent.name))
        }
        if not complete:
            return None
        newest = complete[max(complete)]
        recorded = read_record(newest, "provenance")["provenance"]
        changed = [name for name in provenance if recorded.get(name) != provenance[name]]
        if changed:
            raise UsageError(
                f"{newest.parent} is a checkpoint of another training: expected the same {' and '.join(changed)}, "
                "found another; remove it, or choose another --out"
            )
        return newest.parent

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Raise `DarwinError` if a file of a complete checkpoint is not what was written."""
        changed = first_change(checkpoint, read_record(checkpoint / FINISHED, "files")["files"])
        if changed is not None:
            raise DarwinError(
                f"the checkpoint {checkpoint} is damaged: expected the {changed} that the training wrote, found "
                "another or none; delete the checkpoint, and the training goes on from the one before"
            )
