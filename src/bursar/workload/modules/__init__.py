"""The preset models as plain PyTorch modules, one file per family, in the field's own names."""
