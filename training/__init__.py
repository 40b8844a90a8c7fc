"""What base.py needs around the training of train.py: inputs, the split, processes, resuming."""
