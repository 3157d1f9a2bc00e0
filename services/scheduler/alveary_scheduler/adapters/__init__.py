"""What starts nodes."""
