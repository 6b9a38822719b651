"""The names of the package; see `pymerge.lazy`."""

from pymerge.analysis.advice import Advice as Advice
from pymerge.analysis.advice import advise as advise
from pymerge.analysis.advice import averaging_coefficient as averaging_coefficient
from pymerge.analysis.api import analyze as analyze
from pymerge.analysis.interference import Interference as Interference
from pymerge.analysis.interference import predict_interference as predict_interference
from pymerge.analysis.output import write_analysis as write_analysis
from pymerge.analysis.records import Analysis as Analysis
from pymerge.analysis.records import Facts as Facts
from pymerge.analysis.records import Group as Group
from pymerge.analysis.records import Histogram as Histogram
from pymerge.analysis.records import Model as Model
from pymerge.analysis.records import Quantiles as Quantiles
from pymerge.analysis.records import Spectrum as Spectrum
from pymerge.analysis.records import Tensor as Tensor
from pymerge.analysis.records import Trimmed as Trimmed
