"""Arcee Fusion."""
