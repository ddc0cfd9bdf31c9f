"""How tensors become a segment: recipes, the reads that they come to, and digests of what is read."""
