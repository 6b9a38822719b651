"""Comparisons with other tools; `make test-peers` runs them in an environment that has those."""
