"""Tables, figures and pages from rows of results."""
