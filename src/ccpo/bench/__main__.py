"""``python -m ccpo.bench``, for a machine where the command is not installed."""

import sys

from ccpo.cli import main

sys.argv.insert(1, "bench")
main()
