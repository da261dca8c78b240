"""What is looked at before a model is worked on: names, files, configurations, and its state."""
