"""The program `darwinlm`, and `python -m darwinlm`."""

import sys


def main() -> int:
    """Run the command line, whose modules take a moment to load: it may be interrupted before it can say so itself."""
    try:
        from darwinlm.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("darwinlm: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
