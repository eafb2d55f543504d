"""`SinkCache`, its copies and its files."""
