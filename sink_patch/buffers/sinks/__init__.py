"""The sinks of all layers: who keeps them, and how those that turn alike are turned together."""
