"""The verbs of the ``mlvgm`` command, one module each."""
