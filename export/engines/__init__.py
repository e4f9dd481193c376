"""Build engines from a bundle: TensorRT, TensorRT-RTX, Torch-TensorRT, and exported programs of PyTorch."""
