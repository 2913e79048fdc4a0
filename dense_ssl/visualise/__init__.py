"""Pictures: of what a run sees (samples, crops, masks) and of what its backbone makes of it."""
