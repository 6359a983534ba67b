"""Further forms of a proven adapter: merged into its base, and as GGUF for llama.cpp.

`allowed.py` says before training what cannot be made, `make.py` makes one and loads it again, `merged.py` and
`gguf_files.py` are the two kinds of file, `llama_cpp.py` and `vocabulary.py` what llama.cpp calls things; `likeness.py`
compares what was read back with what was to be written.
"""
