"""Merging with data: statistics of models collected from data, and gradients.

`collect_fisher` and `collect_gram` return a `ModelStatistics`, `save_statistics` writes it next to
a model, and `fisher_merge`, `regmean_merge` and `gradient_matching` merge with it; configs name the
files. `regmean_plus_plus` and `gradient_merge` need the data during the merge.
"""

from __future__ import annotations

from pymerge.lazy import names_of_stub

__getattr__, __dir__ = names_of_stub(__name__, __file__)
