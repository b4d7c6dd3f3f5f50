"""Train several adapters at once over one frozen model: every step computes the rows of all of them in one batch."""
