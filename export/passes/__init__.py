"""Graph rewrites that turn a canonical graph into one for a target: one per file, each small and checked alone."""
