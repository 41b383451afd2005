"""One module per stage: run(config, inputs, out_dir) -> StageResult."""
