"""Everything that is decided before a job trains: recipe, micro-batch, plan, preview.

Our code imports no torch here; an import contract checks it.
"""
