"""The image: what the Dockerfile says, and what it makes, without a container engine."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
"""The repository's folder."""
