"""Is the working tree as fast as an earlier commit?  Elimination and `demo`, in turn, in one run.

    python benchmarks/between_commits.py 09624f4              # three quarters of an hour to two hours on two cores
    python benchmarks/between_commits.py 09624f4 --rounds 3
    python benchmarks/between_commits.py 48f69ef --no-demo

Each side runs in processes of its own, with its own sources and the same installed packages. The sides take turns, of
which the first warms up and does not count. The table gives medians, and of the ratio now / earlier the range too.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from darwinlm.runtime.device import processor_name
from darwinlm.runtime.timing import alternate

ROOT = Path(__file__).parent.parent
CASES = ("576x1536", "1024x4096", "1024x1024x64")
ELIMINATE = """
import sys, torch
sys.path.insert(0, "benchmarks")
import elimination
torch.set_num_threads(1)
d_out, d_in, width = [*map(int, sys.argv[1].split("x")), 1][:3]
kind = "mlp" if width == 1 else "attention"
unit = elimination.Unit(f"block-00-{kind}", 0, kind, "consumer", (), width, d_in // width, 1, 0)
problem = elimination.make_problem(d_out, d_in)
print(sorted(elimination.timed(lambda: elimination.eliminate(unit, *problem), 5))[2])
"""


@contextmanager
def unpacked(commit: str) -> Iterator[Path]:
    """A temporary directory with the files of a commit."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if archive.returncode:
        sys.exit(f"no commit {commit} in {ROOT}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
        yield Path(directory)


def run_in(tree: Path, *arguments: str) -> str:
    """What a Python process with the sources of this tree prints."""
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr}")
    return done.stdout


def eliminate(tree: Path, case: str) -> float:
    """Seconds of one elimination on one thread, the median of five."""
    return float(run_in(tree, "-c", ELIMINATE, case))


def demo(tree: Path) -> float:
    """Seconds of a whole `darwinlm demo` in a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        run_in(tree, "-m", "darwinlm", "demo", "--out", f"{directory}/demo")
        return time.perf_counter() - began


def row(name: str, work: Callable[[Path], float], earlier: Path, rounds: int) -> str:
    """The row of a work that takes a tree and returns seconds."""
    turns = alternate({tree: partial(work, tree) for tree in (earlier, ROOT)}, rounds, name)
    ratios = [now / before for before, now in zip(turns[earlier], turns[ROOT], strict=True)]
    spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return f"| {name} | {median(turns[earlier]):.3g} | {median(turns[ROOT]):.3g} | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Is the working tree as fast as an earlier commit?")
    parser.add_argument("commit")
    parser.add_argument(
        "--rounds", type=int, default=1, help="turns of the demo that count, after the first (%(default)s)"
    )
    parser.add_argument("--no-demo", action="store_true", help="only elimination, in ten minutes")
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}, {processor_name()}, {os.cpu_count()} cores, against {arguments.commit}\n")
    print("| work | earlier, s | now, s | now / earlier (range) |\n|---|---|---|---|")
    with unpacked(arguments.commit) as earlier:
        for case in CASES:
            print(row(f"eliminate {case}", partial(eliminate, case=case), earlier, 4), flush=True)
        if not arguments.no_demo:
            print(row("demo", demo, earlier, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
