"""What both sides use: contracts, tables, the state machine, storage. No torch, no fastapi."""
