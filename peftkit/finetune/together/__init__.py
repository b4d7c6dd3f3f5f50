"""Train several adapters at once over one frozen model: on a GPU a step computes the rows of all of them in one batch."""
