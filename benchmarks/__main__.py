"""``make bench``, ``python -m benchmarks``: the same as ``python -m benchmarks.layer_sweep``."""

import sys

from benchmarks.layer_sweep import main

sys.exit(main())
