"""One DeepSpeed engine and one loop for every training of the recipe."""
