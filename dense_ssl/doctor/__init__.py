"""`make doctor`: what this machine has, whether it works, how fast it is, and what a run would need of it."""
