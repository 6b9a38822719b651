"""Methods that weigh by statistics of data."""
