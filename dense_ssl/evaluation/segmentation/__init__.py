"""Semantic segmentation: a linear probe on frozen cells, and networks trained end to end."""
