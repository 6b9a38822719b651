"""Adapters as PEFT stores them: read, checked, written; a base with one as a checkpoint."""
