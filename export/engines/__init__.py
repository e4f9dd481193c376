"""What turns a bundle into engines for one GPU: TensorRT, Torch-TensorRT, and exported programs of PyTorch."""
