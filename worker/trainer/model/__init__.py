"""The frozen base model and what is trained on it: LoRA, full weights, a classification head."""
