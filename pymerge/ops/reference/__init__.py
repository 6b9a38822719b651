"""The ops in plain torch: the definitions that every backend is tested against."""
