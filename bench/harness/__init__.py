"""What the measurements share: cases, providers, checks, timing."""
