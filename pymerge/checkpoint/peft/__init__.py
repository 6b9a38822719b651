"""Adapters as PEFT stores them: reading, checking, writing; a base with an adapter as a
checkpoint."""
