"""Search over layouts and levers, and its proof on published runs."""
