"""Read dataset files and turn rows into examples.

Owns: file kinds (JSON lines, CSV, Parquet) and row formats. Must not know about tokens, HTTP or the database.
"""
