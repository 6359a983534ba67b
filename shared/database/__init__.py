"""All SQL of the code base.

Owns: tables, sessions, and every query and write. Must not touch S3, Redis or torch.
"""
