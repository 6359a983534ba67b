"""One attempt at a job, under its lease: stage, train, prove, publish, finish.

Owns: the order of effects, and every guarded write that an attempt makes. Must not import torch.
"""
