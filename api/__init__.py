"""The HTTP server: the OpenAI fine-tuning API on top of `shared`.

Owns: routes, authentication of a request, and the conversion of database rows to response objects.
Must not import `worker` or `client`.
"""
