"""Merging by what data says of models: statistics collected from it, and gradients.

`collect_fisher` and `collect_gram` make a `ModelStatistics`, `save_statistics` keeps it beside a
model, and `fisher_merge`, `regmean_merge` and `gradient_matching` merge with it; configs name the
files. `regmean_plus_plus` and `gradient_merge` need the data while they merge.
"""

from __future__ import annotations

from pymerge.lazy import names_of_stub

__getattr__, __dir__ = names_of_stub(__name__, __file__)
