"""Whole images looked for among others: landmarks and copies."""
