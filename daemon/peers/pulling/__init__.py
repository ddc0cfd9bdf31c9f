"""Loading from other nodes: who brings what, and what the origin brings."""
