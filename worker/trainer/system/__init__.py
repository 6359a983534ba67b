"""The machine: devices, memory, and resource errors. The lowest layer of the trainer."""
