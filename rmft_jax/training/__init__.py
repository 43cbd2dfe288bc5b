"""Training: mesh, optimizer, the jitted input and train step, checkpoints, the loop."""
