"""The machine: device, memory and the errors that say that a resource ran out. The ground floor of the trainer."""
