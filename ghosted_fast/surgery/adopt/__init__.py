"""Operators that others fitted: found in their modules, hooks and files, and made ours."""
