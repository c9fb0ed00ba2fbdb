"""The one place that knows ModelPatcher, CLIP, VAE, folders, progress and interrupt."""
