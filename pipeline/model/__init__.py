"""Tensors: the heterogeneous Llama, its checkpoints, surgery, fusion and export formats."""
