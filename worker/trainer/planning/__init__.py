"""Everything that is decided before a device is held: recipe, micro-batch, plan, preview. Must not import torch."""
