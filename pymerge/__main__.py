"""`python -m pymerge` is the command `pymerge`."""

from __future__ import annotations

import sys

from pymerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
