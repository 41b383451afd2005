"""Scripts that other environments run: they import nothing of this project."""
