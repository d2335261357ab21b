"""Searches: learning rate and weight decay, chosen on validation images alone."""
