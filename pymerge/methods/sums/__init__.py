"""Weighted sums."""
