"""The method in other people's trainers."""
