"""Speed and memory beside plain training and the usual ways of doing the same."""
