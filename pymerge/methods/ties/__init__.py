"""TIES."""
