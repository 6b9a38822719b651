"""The engine: streams tiles through the ops. It knows passes, but neither files nor arithmetic."""
