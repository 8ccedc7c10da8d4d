"""How good a trained model is: `metrics` and `pictures` by kind of data."""
