"""Fast kernels for hierarchical vision-language transformers in PyTorch."""
