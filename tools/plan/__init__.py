"""What a recipe costs before the first GPU hour is spent."""
