"""The demo model: from the GGUF file that is downloaded to a plain model directory."""
