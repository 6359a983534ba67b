"""The parent's side of a trainer process: start, signal, read and reuse it.

Must not know jobs, leases or the database.
"""
