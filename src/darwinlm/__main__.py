"""The program `darwinlm`, and `python -m darwinlm`."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> int:
    """Run the command line, whose modules take a moment to load: it may be interrupted before it can say so itself.

    SIGTERM acts like Ctrl-C. Where nobody reads the output any more, the program ends without a word.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from darwinlm.cli import main as run

        code = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("darwinlm: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its own end
        return 128 + signal.SIGPIPE
    return code


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
