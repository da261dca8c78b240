"""What the demo, the tests and the benchmarks fetch: models, texts and questions from packages."""
