"""Memory of other nodes, read through NIXL in a process of its own."""
