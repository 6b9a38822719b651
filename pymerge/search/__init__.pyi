"""The names of the package; see `pymerge.lazy`."""

from pymerge.search.config import SearchConfig as SearchConfig
from pymerge.search.config import load_search as load_search
from pymerge.search.data import Split as Split
from pymerge.search.journal import Trial as Trial
from pymerge.search.remerge import Merged as Merged
from pymerge.search.remerge import Remerger as Remerger
from pymerge.search.study import SearchResult as SearchResult
from pymerge.search.study import run_search as run_search
