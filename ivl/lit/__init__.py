"""PyTorch Lightning: module, data module, command line; nothing else imports Lightning."""
