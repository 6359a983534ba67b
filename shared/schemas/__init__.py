"""Pydantic models of everything that is sent over HTTP or stored as JSON.

Owns: requests, responses, results, previews, manifests and memory figures. Pure: of our code it imports only
`shared.errors`; no database, no HTTP, no torch.
"""
