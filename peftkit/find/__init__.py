"""Finding what a config means in a model: target modules, and where sub-layers begin and end."""
