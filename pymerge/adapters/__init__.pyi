"""The names of the package; see `pymerge.lazy`."""

from pymerge.adapters.arithmetic import add as add
from pymerge.adapters.arithmetic import analogy as analogy
from pymerge.adapters.arithmetic import negate as negate
from pymerge.adapters.arithmetic import scale as scale
from pymerge.adapters.combine import merge_adapters as merge_adapters
from pymerge.adapters.config import run_merge_adapters as run_merge_adapters
from pymerge.adapters.extract import ExtractReport as ExtractReport
from pymerge.adapters.extract import extract_lora as extract_lora
from pymerge.adapters.fold import fold as fold
from pymerge.checkpoint.peft.adapter import Adapter as Adapter
from pymerge.checkpoint.peft.files import load as load
