"""What a model is to a sink cache: its family, its adapters, its layers, and the proof of them."""
