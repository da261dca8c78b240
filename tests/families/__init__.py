"""Tiny random models of every class of transformers, and a sweep over them."""
