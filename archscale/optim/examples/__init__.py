"""`MatrixOptimizer` in plain PyTorch programs: one small script for each way of running them."""
