"""Background threads of a slot: sweeper, garbage collector, preemption notices, device reports.

Must not import torch, nor run a job.
"""
