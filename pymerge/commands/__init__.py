"""The commands of `pymerge`: one module each, with its options, its run and its output."""
