"""Code that travels inside an exported directory: it may import torch and transformers, and nothing of this project."""
