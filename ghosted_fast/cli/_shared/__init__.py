"""What the verbs share: their options, what they load, and how they show a result and fail."""
