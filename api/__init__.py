"""HTTP: the OpenAI fine-tuning API over shared/. Knows nothing of the worker or the client."""
