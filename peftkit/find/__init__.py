"""Find the parts of a model that a config refers to: target modules, task heads, and the boundaries of sub-layers."""
