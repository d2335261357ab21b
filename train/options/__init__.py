"""Every command's options."""
