"""file --> rows --> the norms of one run: what a training job has logged.

=========  =====================================================================================
file       what it does
=========  =====================================================================================
`reading`  file --> rows: CSV (or TSV) with a header, JSONL, TensorBoard event files, or a log in
           memory
`runs`     rows --> one run: a file may hold several, which are told apart and never mixed
=========  =====================================================================================

A cell that is empty was not logged in that step. "nan" and "inf" were, and are kept.
"""

from .reading import Log as Log
from .reading import read_log as read_log
from .runs import Run as Run
from .runs import read_run as read_run
