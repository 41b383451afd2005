"""The recipe as a whole: materialized, killed, resumed, reused."""
