"""Models that stay in their files: opened without memory, read a piece at a time."""
