"""Images as a vision graph wants them: a file for each kind of processor, and for each kind of tower's tables."""
