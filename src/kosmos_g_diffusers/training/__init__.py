"""Training of Kosmos-G: the three stages of the paper, their data, and one loop."""
