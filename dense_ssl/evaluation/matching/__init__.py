"""Cells compared with cells, nothing trained: videos, correspondences, dense retrieval, attention."""
