"""Other ways to ask for a sink cache than `generate` itself: generation configs, and what goes past `generate`."""
