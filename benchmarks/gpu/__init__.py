"""What an NVIDIA GPU does with the product: `python -m benchmarks.gpu`."""
