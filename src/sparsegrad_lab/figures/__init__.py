"""Pictures of the method at work: `collect` runs and measures, the drawing files turn its numbers into figures."""
