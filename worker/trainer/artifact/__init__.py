"""The published folder: write it, read it back, and prove that it works."""
