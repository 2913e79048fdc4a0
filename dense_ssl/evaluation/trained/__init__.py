"""What protocols that train a network end to end share: settings, samples, optimisers, the state of a job."""
