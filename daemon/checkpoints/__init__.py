"""What is at a URI: its files, their headers, its configuration, and what of it is kept on disk."""
