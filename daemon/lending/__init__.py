"""Lending segments to processes: the sockets, who is at the other end, and leases."""
