"""Shift Python's wall clock by SKEW_SECONDS. Python imports this module first if this folder is on PYTHONPATH."""

from __future__ import annotations

import os
import time

_correct = time.time
time.time = lambda: _correct() + float(os.environ["SKEW_SECONDS"])
