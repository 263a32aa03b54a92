"""What follows the logits."""
