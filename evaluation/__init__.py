"""Evaluation: tasks and prompts, batched decoding, programs in a sandbox, verdicts, results."""
