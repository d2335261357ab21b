"""The training program: `python -m tcpa.train` (or `tcpa-train`) lists its subcommands."""
