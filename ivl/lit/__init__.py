"""PyTorch Lightning: module, data module, command line. The only folder that imports Lightning."""
