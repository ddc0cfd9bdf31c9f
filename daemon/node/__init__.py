"""All of one node: which stages there are, which of them a request means, and what there is to see of it."""
