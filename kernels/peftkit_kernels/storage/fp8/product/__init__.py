"""Products with float8 weights in float8: the rows of the other operand are quantised in the call."""
