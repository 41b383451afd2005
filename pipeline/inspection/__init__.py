"""Looking at a store without changing it: why a stage would run again, what is broken, what nobody refers to."""
