"""Plausible one-line faults, and the tests that must notice them: `make test-mutants`."""
