"""What outlives the daemon: the process that holds every descriptor, what is deposited there, and talking to it."""
