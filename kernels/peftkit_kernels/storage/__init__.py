"""How frozen weights are stored, one folder for each quantised kind."""
