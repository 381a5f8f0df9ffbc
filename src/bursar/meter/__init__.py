"""A real step measured: the FLOPs of the ops that run, the bytes they hold at their fullest."""
