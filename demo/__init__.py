"""The embedded default: its text, the chain of its stages, its table."""
