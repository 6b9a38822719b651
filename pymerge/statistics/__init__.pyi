"""The names of the package; see `pymerge.lazy`."""

from pymerge.statistics.entry_point import CollectSetup as CollectSetup
from pymerge.statistics.files import ModelStatistics as ModelStatistics
from pymerge.statistics.files import load_statistics as load_statistics
from pymerge.statistics.files import save_statistics as save_statistics
from pymerge.statistics.fisher import collect_fisher as collect_fisher
from pymerge.statistics.gradients import gradient_merge as gradient_merge
from pymerge.statistics.gram import collect_gram as collect_gram
from pymerge.statistics.plus_plus import regmean_plus_plus as regmean_plus_plus
from pymerge.statistics.run import Collected as Collected
from pymerge.statistics.run import run_collect as run_collect
