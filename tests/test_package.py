"""The package: its imports are declared, and its wheel holds what it reads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"peft": "lora", "lm-eval": "eval", "libgguf": "quant"}
"""Distributions that are imported where they are used, and the extra that installs each."""


def distribution_name(requirement: str) -> str:
    """The normalised name of the distribution in a requirement such as `PyYAML>=6.0.1`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ]", requirement)[0]).lower()


def imported_modules() -> set[str]:
    """Top-level names of the modules, of neither Python nor this package, that any file in src/ imports."""
    names: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"darwinlm"}


def test_every_import_is_declared_and_every_dependency_is_imported() -> None:
    required = {distribution_name(text) for text in PROJECT["dependencies"]}
    extras = {
        extra: {distribution_name(text) for text in texts} for extra, texts in PROJECT["optional-dependencies"].items()
    }
    known = packages_distributions()
    imported = {distribution_name(known.get(module, [module])[0]) for module in imported_modules()}
    for name in imported:
        assert name in required or (name in OPTIONAL and name in extras[OPTIONAL[name]]), f"{name} is not declared"
    assert required <= imported, f"declared but never imported: {sorted(required - imported)}"


def test_the_lowest_versions_are_those_that_are_declared() -> None:
    """`make test-lowest` says nothing of a minimum that it does not install."""
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    pinned = {distribution_name(name): version for name, version in pinned.items()}
    for requirement in PROJECT["dependencies"]:
        minimum = requirement.partition(">=")[2]
        exact = pinned[distribution_name(requirement)]
        assert exact == minimum or re.fullmatch(re.escape(minimum) + r"(\.0)+", exact), requirement


def test_what_make_installs_is_no_older_than_what_is_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {distribution_name(line): line.split("==")[1] for line in lines if "==" in line}
    for requirement in PROJECT["dependencies"]:
        minimum = [int(part) for part in requirement.partition(">=")[2].split(".")]
        version = [int(part) for part in pinned[distribution_name(requirement)].split(".")]
        assert version >= minimum, requirement


def test_recipes_and_presets_have_different_names() -> None:
    """Both are chosen by `--preset NAME`."""
    package = ROOT / "src" / "darwinlm"
    presets, recipes = ({path.stem for path in (package / folder).glob("*.yaml")} for folder in ("presets", "recipes"))
    assert presets == {"paper"}
    assert recipes == {"llama-2-7b", "llama-3.1-8b", "qwen-2.5-14b-instruct"}
    for path in (package / "recipes").glob("*.yaml"):
        assert {"model", "data", "out", "stages"} <= set(yaml.safe_load(path.read_text())), path


@pytest.mark.slow
def test_the_wheel_holds_every_file_that_the_package_reads(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"  # setuptools writes build/ and *.egg-info beside pyproject.toml
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if name.startswith("src/") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*build, "--wheel-dir", str(tmp_path)], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = source / "src"
    wanted = {str(path.relative_to(package)) for path in package.rglob("*") if path.suffix in (".py", ".yaml")}
    assert wanted <= names, sorted(wanted - names)
    for name in ("py.typed", "presets/paper.yaml", "recipes/llama-2-7b.yaml", "model/modeling_pruned_llama.py"):
        assert f"darwinlm/{name}" in names
    assert f"darwinlm-{PROJECT['version']}-" in wheel.name
