"""Virtual environments of programs that are no dependencies, kept in a cache outside of the repository."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "darwinlm", "environments")


def find_environment(name: str) -> Path | None:
    """Python of an environment that was made before, None if there is none."""
    return _python(name) if (ROOT / name / "complete").exists() else None


def make_environment(name: str, packages: Sequence[str], without: Sequence[str] = ()) -> Path:
    """Python of an environment with these packages, which is made if it is not there.

    Args:
        without: packages that others bring and that do not work here.
    """
    found = find_environment(name)
    if found is not None:
        return found
    python = _python(name)
    venv.create(ROOT / name, with_pip=True, clear=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    if without:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *without], check=True)
    (ROOT / name / "complete").touch()
    return python


def version(python: Path, package: str) -> str:
    """The version of a package in an environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _python(name: str) -> Path:
    return ROOT / name / "bin" / "python"
