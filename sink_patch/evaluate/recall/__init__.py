"""What a model recalls of its stream, and how much of its attention lies on the sinks."""
