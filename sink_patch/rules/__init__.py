"""What a forward sees and where tokens lie, in plain integers."""
