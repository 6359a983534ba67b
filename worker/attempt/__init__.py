"""One attempt at a job, under its lease: stage, train, verify, publish, finish.

Owns: the order of effects, and every write guarded by the lease epoch. Must not import torch.
"""
