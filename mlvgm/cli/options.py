"""Kinds of values that the options of several verbs take."""

import argparse


def number_of_samples(text: str) -> int | str:
    """The type of ``--samples``: a number from 1 on, or "auto"."""
    if text == "auto":
        return text
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, or auto, not {text!r}")
    return int(text)
