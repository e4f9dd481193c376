"""Trained defences that the purifier is compared with, each trained by one command from the images of the purifier."""
