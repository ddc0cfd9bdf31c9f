"""What happened, for whoever watches: metrics, clocks, logs. Told by all rooms, knows none of them."""
