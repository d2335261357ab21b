"""What trains a method on a dataset: rows of the tables, official scripts, the resolved run."""
