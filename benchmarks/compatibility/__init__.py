"""The census: every architecture is adapted, trained for a step, merged, saved and loaded, and checked."""
