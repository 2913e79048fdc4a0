"""Files from elsewhere, damaged at random and on purpose: does every reader keep its promise: `make fuzz`."""
