"""Step-by-step solvers, one per task: the algorithm that finds the answer writes down what it does."""
