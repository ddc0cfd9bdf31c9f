"""Bytes on their way into segments: where they land, who hashes them, and the account of what is there."""
