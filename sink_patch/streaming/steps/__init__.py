"""What one forward over a cache is: the plan of each row, and the step that all layers share."""
