"""What a recipe will cost before it runs: tokens, FLOPs, memory, disk and time of every stage, from configuration."""
