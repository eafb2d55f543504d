"""A model's directory whose generation_config.json asks for a sink cache (`sink-patch configure`)."""
