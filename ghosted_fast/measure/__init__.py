"""What a model is worth: perplexity, accuracy and speed, and the machine it was measured on."""
