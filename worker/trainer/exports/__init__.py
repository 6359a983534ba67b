"""Other forms of a verified adapter: merged into its base, and as GGUF for llama.cpp.

`make.py` makes an export, loads it again and compares. `merged.py` and `gguf.py` read and write the two kinds of files.
`fingerprint.py` compares the tensors that were read back with those that were written. Before training,
`planning/exports.py` refuses what cannot be made. `llama_cpp` has llama.cpp's names and layouts.
"""
