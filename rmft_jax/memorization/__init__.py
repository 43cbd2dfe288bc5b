"""What a model has memorized: extraction attacks and the rates that sum them up."""
