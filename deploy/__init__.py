"""What goes in front of TorchServe and around it in production."""
