"""The training engine: from settings and batches to a finished run folder."""
