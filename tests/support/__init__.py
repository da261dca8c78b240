"""What tests of several folders share; on the path as `support` (pyproject.toml)."""
