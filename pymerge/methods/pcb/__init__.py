"""PCB-Merging."""
