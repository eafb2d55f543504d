"""Slots, the blocks of one request in all allocators: room for those that come, and slots that are kept."""
