"""Set-up that every test shares."""

from __future__ import annotations

import os

# Before torch: a forked worker must find no thread pool that only its parent has.
os.environ.setdefault("OMP_NUM_THREADS", "1")
