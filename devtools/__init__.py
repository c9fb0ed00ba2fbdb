"""Tools around the pack: an environment with ComfyUI in it, a running server, the demonstration. Not part of the pack."""
