"""The parts of `gpu_day.py`: what a GPU is wanted for."""
