"""Is the working tree as fast as an earlier commit?  Elimination and `demo`, in turn, in one run.

    python benchmarks/between_commits.py 09624f4              # about 20 minutes on two cores
    python benchmarks/between_commits.py 09624f4 --rounds 3

Each side runs in processes of its own, with its own sources and the same installed packages, in the order
earlier, now, now, earlier, ... so that a drift of the machine's speed falls on both. The ratio is now / earlier, of
whole seconds; the table gives the median of the rounds and their range.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from elimination import processor

ROOT = Path(__file__).parent.parent
CASES = ("576x1536", "1024x4096", "1024x1024x64")
ELIMINATE = """
import sys, time, torch
sys.path.insert(0, "benchmarks")
import elimination
torch.set_num_threads(1)
d_out, d_in, width = [*map(int, sys.argv[1].split("x")), 1][:3]
kind = "mlp" if width == 1 else "attention"
unit = elimination.Unit(f"block-00-{kind}", 0, kind, "consumer", (), width, d_in // width, 1, 0)
problem = elimination.make_problem(d_out, d_in)
print(sorted(elimination.timed(lambda: elimination.eliminate(unit, *problem), 5))[2])
"""


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Is the working tree as fast as an earlier commit?")
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs the demo (default: 2)")
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, against {arguments.commit}\n")
    print("| work | earlier, s | now, s | now / earlier (range) |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        earlier = Path(directory)
        archive = subprocess.run(["git", "archive", arguments.commit], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
        works = {f"eliminate {case}": (lambda tree, case=case: eliminate(tree, case), 4) for case in CASES}
        works["demo"] = (demo, arguments.rounds)
        for name, (work, rounds) in works.items():
            pairs = []
            for number in range(rounds):
                order = (earlier, ROOT) if number % 2 == 0 else (ROOT, earlier)
                seconds = {tree: work(tree) for tree in order}
                pairs.append((seconds[earlier], seconds[ROOT]))
            before, now = (median(side) for side in zip(*pairs, strict=True))
            ratios = [new / old for old, new in pairs]
            spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"| {name} | {before:.3g} | {now:.3g} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
