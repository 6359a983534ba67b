"""Predict memory and time of a run, and hold every default of the recipe.

Pure arithmetic on a base's architecture: must not import torch, read a file or use the database.
"""
