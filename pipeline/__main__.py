"""`python -m pipeline`: plan, explain, materialize, summary, chat, doctor."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
