"""See the method: which tokens are kept, how losses move, what a run costs, which k to take."""
