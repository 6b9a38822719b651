"""The engine: streams tiles through the ops. It knows passes, and neither files nor arithmetic."""
