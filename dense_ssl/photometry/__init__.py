"""What changes colours: operations, the named policies built of them, and AutoAugment."""
