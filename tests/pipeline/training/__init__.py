"""The trainings: losses, engine, loop, resume, stages."""
