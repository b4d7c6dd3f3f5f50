"""The product with a quantised weight that is decoded in the loop of the kernel."""
