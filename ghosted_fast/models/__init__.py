"""What a decoder is: its family, its layers, their boundaries, and the ghosts among them."""
