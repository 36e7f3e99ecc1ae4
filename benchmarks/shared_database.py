"""Runs over one database: the same model, text and seed make the same one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from darwinlm.commands.compress import run
from darwinlm.commands.run_directory import SETTINGS, Run, claim
from darwinlm.config.run import RunConfig, Stage


def run_over(base: Path, config: RunConfig, until: Stage) -> Run:
    """Run `config` with the database of the run `base`, which is built now if it is not there."""
    path = Path(config.out)
    what = {"seed": config.seed, "calibration": config.calibration, "database": config.database}
    run(RunConfig(config.model, config.data, str(base), **what), until="database")
    if not (path / "database").exists():
        path.mkdir(parents=True, exist_ok=True)
        claim(path, SETTINGS, config)
        shutil.copytree(base / "database", path / "database", copy_function=os.link)
    return run(config, until=until)
