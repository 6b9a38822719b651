"""The demos: fine-tune a small real model on several tasks, merge it back, measure what is kept.

`python -m benchmarks.demo.llm` (`make demo`) and `python -m benchmarks.demo.vision`
(`make demo-small`). docs/demo.md describes what they do and where they store files.

Importing this package sets environment variables, because torch and the Hugging Face libraries read
theirs only once, on first import. The user's settings take precedence.
"""

from __future__ import annotations

import os

_ENVIRONMENT = {
    # Everything comes from installed packages; nothing here may wait for a network.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Progress bars of other libraries; the demos have their own.
    "TQDM_DISABLE": "1",
    # Waiting threads of torch's OpenMP pool sleep: on shared cores, spinning costs more than it
    # saves.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
