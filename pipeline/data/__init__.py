"""Text in, packed tokens out: sources, chat templates, masks, mixtures, decontamination."""
