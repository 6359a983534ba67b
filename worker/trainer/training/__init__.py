"""The training loop and all that lives as long as a run. Read `loop` first."""
