"""What llama.cpp can read: its names and layouts of architectures, and tokenizers as its vocabularies.

Checked before training, so it must not import torch; `exports` writes the files.
"""
