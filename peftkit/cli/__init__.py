"""The ``peftkit`` command: thin commands over the library."""
