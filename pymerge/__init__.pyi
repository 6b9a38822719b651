"""The names of pymerge and the module of each, which is imported when a name is first asked for."""

from types import ModuleType

from pymerge._version import __version__ as __version__
from pymerge.adamerging.module import AdaMerging as AdaMerging
from pymerge.analysis.api import analyze as analyze
from pymerge.errors import CheckpointError as CheckpointError
from pymerge.errors import MergeError as MergeError
from pymerge.errors import NonFiniteError as NonFiniteError
from pymerge.errors import RequestError as RequestError
from pymerge.merging.api import merge as merge
from pymerge.merging.files import merge_checkpoints as merge_checkpoints
from pymerge.merging.report import MergeReport as MergeReport
from pymerge.merging.task_vector import TaskVector as TaskVector
from pymerge.methods import methods as methods
from pymerge.methods.arcee.functions import *
from pymerge.methods.directions.functions import *
from pymerge.methods.matrices.functions import *
from pymerge.methods.pcb.functions import *
from pymerge.methods.pointwise.functions import *
from pymerge.methods.sce.functions import *
from pymerge.methods.sparse.functions import *
from pymerge.methods.statistics.functions import *
from pymerge.methods.sums.functions import *
from pymerge.methods.ties.functions import *
from pymerge.statistics.files import ModelStatistics as ModelStatistics
from pymerge.statistics.files import load_statistics as load_statistics
from pymerge.statistics.files import save_statistics as save_statistics
from pymerge.statistics.fisher import collect_fisher as collect_fisher
from pymerge.statistics.gradients import gradient_merge as gradient_merge
from pymerge.statistics.gram import collect_gram as collect_gram
from pymerge.statistics.plus_plus import regmean_plus_plus as regmean_plus_plus

_C: ModuleType  # the native library, where it is built
