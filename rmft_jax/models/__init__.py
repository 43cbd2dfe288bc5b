"""Models: one decoder, its layers in Flax NNX, its parameters a plain nested dict."""
