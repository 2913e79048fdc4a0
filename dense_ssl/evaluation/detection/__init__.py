"""Object detection and instance segmentation by networks trained end to end."""
