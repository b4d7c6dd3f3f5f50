"""Products with 8-bit weights in 8 bits: the rows of the other operand are quantised in the call."""
