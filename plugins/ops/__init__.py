"""What each op computes: a spec and a numpy reference."""
