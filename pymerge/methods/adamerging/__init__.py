"""AdaMerging with learned coefficients."""
