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
from pymerge.methods.arcee.functions import arcee_fusion as arcee_fusion
from pymerge.methods.directions.functions import karcher as karcher
from pymerge.methods.directions.functions import model_stock as model_stock
from pymerge.methods.directions.functions import multislerp as multislerp
from pymerge.methods.directions.functions import nuslerp as nuslerp
from pymerge.methods.directions.functions import passthrough as passthrough
from pymerge.methods.directions.functions import slerp as slerp
from pymerge.methods.matrices.functions import tsv_m as tsv_m
from pymerge.methods.pcb.functions import pcb_merge as pcb_merge
from pymerge.methods.pointwise.functions import consensus_ta as consensus_ta
from pymerge.methods.pointwise.functions import emr as emr
from pymerge.methods.pointwise.functions import magmax as magmax
from pymerge.methods.pointwise.functions import nearswap as nearswap
from pymerge.methods.pointwise.functions import ram as ram
from pymerge.methods.pointwise.functions import ramplus_tl as ramplus_tl
from pymerge.methods.pointwise.functions import tall_masks as tall_masks
from pymerge.methods.sce.functions import sce as sce
from pymerge.methods.sparse.functions import breadcrumbs as breadcrumbs
from pymerge.methods.sparse.functions import breadcrumbs_ties as breadcrumbs_ties
from pymerge.methods.sparse.functions import dare_linear as dare_linear
from pymerge.methods.sparse.functions import dare_ties as dare_ties
from pymerge.methods.sparse.functions import della as della
from pymerge.methods.sparse.functions import della_linear as della_linear
from pymerge.methods.statistics.functions import fisher_merge as fisher_merge
from pymerge.methods.statistics.functions import gradient_matching as gradient_matching
from pymerge.methods.statistics.functions import regmean_merge as regmean_merge
from pymerge.methods.sums.functions import linear as linear
from pymerge.methods.sums.functions import task_arithmetic as task_arithmetic
from pymerge.methods.ties.functions import ties_merge as ties_merge
from pymerge.statistics.files import ModelStatistics as ModelStatistics
from pymerge.statistics.files import load_statistics as load_statistics
from pymerge.statistics.files import save_statistics as save_statistics
from pymerge.statistics.fisher import collect_fisher as collect_fisher
from pymerge.statistics.gradients import gradient_merge as gradient_merge
from pymerge.statistics.gram import collect_gram as collect_gram
from pymerge.statistics.plus_plus import regmean_plus_plus as regmean_plus_plus

_C: ModuleType  # the native library, where it is built
