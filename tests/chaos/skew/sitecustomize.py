"""Imported by Python itself before anything else, where this folder is on PYTHONPATH: a wall clock that is wrong."""

from __future__ import annotations

import os
import time

_right = time.time
time.time = lambda: _right() + float(os.environ["SKEW_SECONDS"])
