"""Policies: which entries of a prompt stay in the cache."""
