"""Fleets that load at once, simulated; see ``fleet``."""
