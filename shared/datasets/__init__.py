"""Read dataset files and turn rows into examples.

Owns: file types (JSON lines, CSV, Parquet) and row formats. Must not depend on tokenizers, HTTP or the database.
"""
