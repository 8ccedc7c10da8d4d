"""How good a trained model is; `figures` brings it together."""
