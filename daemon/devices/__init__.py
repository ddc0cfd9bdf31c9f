"""Where segments live: host memory and GPUs, and copies between them."""
