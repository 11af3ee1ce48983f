"""What a run will need, computed from the recipe alone. Imports no torch."""
