"""Systems that the CPU benchmark measures, each a process of its own that answers one request at a time."""
