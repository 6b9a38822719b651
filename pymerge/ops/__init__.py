"""The ops: one contract, and a folder for each backend that computes them."""
