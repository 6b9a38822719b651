"""The demos (`make demo`) and the benchmarks (`make bench`) of pymerge; not part of the package."""
