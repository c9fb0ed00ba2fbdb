"""The miniature: synthetic people, the small Stable Diffusion 1.x trained on them, and the judges that score it."""
