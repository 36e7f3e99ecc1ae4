"""How much faster do two single-threaded processes search than one?

    python benchmarks/processes.py RUN OUT          # RUN: of `darwinlm database smollm2-135m --data vital-wiki`

Both sides search from the uniform genome over the database of RUN with default stages, in turn. The seconds are those
that the history gives for the generations, so loading and the start do not count; both must find the same genome.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from darwinlm.runtime.device import processor_name


def search(run: Path, out: Path, generations: int, processes: int) -> tuple[list[float], list[int]]:
    """The seconds of each generation, and the levels that were found."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "darwinlm", "search", "smollm2-135m", "--data", "vital-wiki"]
    command += ["--out", str(out), "--target", "params=0.8", "--search.start", "uniform", "--reuse", str(run)]
    command += ["--search.generations", str(generations)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "search" / "history.jsonl").read_text().splitlines()]
    made = [line for line in lines if line.get("generation")]
    return [line["seconds"] for line in made], made[-1]["genome"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--generations", type=int, default=3)
    given = parser.parse_args()
    print(f"{datetime.date.today()}, {processor_name()}, {os.cpu_count()} cores")
    if given.out.exists():
        sys.exit(f"{given.out} exists: its searches would not be timed again; name another directory")
    found = {count: search(given.run, given.out / f"{count}", given.generations, count) for count in (1, 2)}
    for count, (seconds, _) in found.items():
        print(f"processes: {count}; seconds of the generations: {', '.join(f'{each:.1f}' for each in seconds)}")
    (one, genome), (two, other) = found[1], found[2]
    print(f"{sum(one) / sum(two):.2f} times as fast")
    if genome != other:
        sys.exit("they found different genomes")


if __name__ == "__main__":
    main()
