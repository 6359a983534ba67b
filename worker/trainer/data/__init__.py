"""Dataset rows as tokens: encoding, labels, packing, statistics. Must not import torch: planning uses it."""
