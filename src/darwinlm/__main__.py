"""`python -m darwinlm`."""

from darwinlm.cli import main

raise SystemExit(main())
