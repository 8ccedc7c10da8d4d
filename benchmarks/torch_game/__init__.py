"""The game in PyTorch, for `against_torch.py`: its networks and one training step."""
