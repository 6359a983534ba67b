"""Code of both the API and the workers: schemas, tables, states, storage. Must not import torch or fastapi."""
