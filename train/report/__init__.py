"""Reports: runs against the published table, with their curves and everything that is missing."""
