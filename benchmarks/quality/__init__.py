"""The quality benchmark: does a merged model do what its parts can do?

`python -m benchmarks.quality SUITE` (`make quality-text`, ...). docs/quality.md says what each
suite does, and what came out.
"""

from __future__ import annotations

# sets the environment that torch and the Hugging Face libraries read when they are first imported
import benchmarks.demo  # noqa: F401
