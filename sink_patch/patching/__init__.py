"""Switching sink_patch on and off."""
