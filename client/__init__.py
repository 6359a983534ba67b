"""The `milliner` command: built on the official `openai` client. Must not import api or worker."""
