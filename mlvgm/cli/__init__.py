"""The verbs of the ``mlvgm`` command, one module each.

A module's docstring is what ``--help`` says, ``add_options`` declares its arguments, and ``run`` does the work.
"""
