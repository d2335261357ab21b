"""FLOPs and bytes from formulas: operations, blocks, whole models, and the times that follow."""
