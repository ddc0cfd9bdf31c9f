"""Which other daemons there are, and what they say that they have."""
