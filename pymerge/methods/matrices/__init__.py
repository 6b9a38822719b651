"""Methods on whole matrices."""
