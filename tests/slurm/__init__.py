"""Trainings on the nodes of a Slurm that the tests start themselves."""
