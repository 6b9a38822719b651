"""Methods on directions and norms: SLERP and its kin."""
