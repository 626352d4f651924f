"""Networks: encoders, the projector/predictor MLP, the hidden-layer tap and the registry."""
