"""Threads beside the slots: sweeper, garbage collector, preemption notices, device reports.

Must not import torch, nor run a job.
"""
