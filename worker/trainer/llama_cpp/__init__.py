"""What llama.cpp can read: its tensor names, its layouts of architectures, and its form of tokenizers.

Planning checks a base with it before training, so it must not import torch. `exports` writes the files.
"""
