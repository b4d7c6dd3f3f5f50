"""Train several adapters at once over one frozen model: by turns, or on a GPU, with few tokens, the rows of all in one batch."""
