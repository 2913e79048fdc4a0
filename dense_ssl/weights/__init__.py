"""Weights that come and go: any checkpoint read without running its code, and others' names for ours."""
