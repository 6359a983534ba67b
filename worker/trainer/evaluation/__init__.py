"""Score a model on held-out rows and compare it with its base."""
