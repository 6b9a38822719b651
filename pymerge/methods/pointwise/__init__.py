"""Methods that look at each element alone."""
