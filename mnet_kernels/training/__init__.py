"""What train.py and evaluate.py are made of: the recipe, data, checkpoints and processes."""
