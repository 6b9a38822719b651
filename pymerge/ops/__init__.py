"""The ops: a contract that all backends share, and one folder for each backend."""
