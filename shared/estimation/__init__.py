"""Predict memory and time of a run, and hold every recipe default.

Pure arithmetic on a model's architecture: no torch, no database, no file access.
"""
