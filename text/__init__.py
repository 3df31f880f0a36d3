"""Text to token sets: sources, formats, worker processes, decontamination."""
