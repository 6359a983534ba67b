"""What travels over HTTP or is stored as JSON, as pydantic models.

Owns: requests, responses, results, previews, manifests and memory figures. Pure: imports nothing of ours but
`shared.errors`; no database, no HTTP, no torch.
"""
