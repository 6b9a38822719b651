"""The quality benchmark: does a merged model do what its parts can do?

`python -m benchmarks.quality SUITE` (`make quality-text`, ...). docs/quality.md describes each
suite and its results.
"""

from __future__ import annotations

# sets the environment variables that torch and the Hugging Face libraries read on first import
import benchmarks.demo  # noqa: F401
