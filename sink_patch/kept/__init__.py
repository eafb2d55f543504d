"""Streams that outlive their call: kept in the process, and taken up by a call whose text goes on with them."""
