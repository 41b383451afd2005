"""The outside world: recipe, artifact store, launcher, run hygiene."""
