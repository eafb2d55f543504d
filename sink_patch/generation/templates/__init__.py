"""What a chat template writes around messages (`sink_patch.chat_settings`)."""
