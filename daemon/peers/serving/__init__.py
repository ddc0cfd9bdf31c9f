"""What this node lends to others."""
