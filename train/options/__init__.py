"""Every command's options. Imports nothing heavy, so that --help is quick."""
