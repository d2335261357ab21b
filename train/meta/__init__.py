"""Meta-prompts of DAM-VP from several datasets."""
