"""What to run: presets, a user's own model or config, optimizers, and the step that is traced."""
