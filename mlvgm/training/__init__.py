"""Training of the default model: a sign classifier and an NVAE on the German Traffic Sign Recognition Benchmark."""
