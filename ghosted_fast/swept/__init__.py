"""What the pipeline does with a model that stays in its files."""
