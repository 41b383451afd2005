"""`python -m pipeline`: one stage, the results of a target, and a question to its final checkpoint."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
