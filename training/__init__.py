"""What both trainers share: heads, pruned backward, optimiser, ranks, run folder, validation."""
