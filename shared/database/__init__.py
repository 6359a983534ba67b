"""Everything that speaks SQL.

Owns: tables, sessions, and every query and guarded write. Must not touch S3, Redis or torch.
"""
