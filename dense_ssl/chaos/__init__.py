"""The fault matrix: what goes wrong, where, with which loader, and what becomes of the run: `make chaos`."""
