"""Videos as a model wants them: frames chosen, resized, and put in slices with the time beside each."""
