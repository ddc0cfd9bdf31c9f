"""Other nodes: finding them, serving them, pulling from them, and the process that moves the bytes."""
