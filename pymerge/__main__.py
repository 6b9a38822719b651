"""`python -m pymerge` is the command `pymerge`."""

from __future__ import annotations

from pymerge.commands.main import run

if __name__ == "__main__":
    run()
