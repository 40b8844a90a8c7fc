"""What base.py needs around the loop of train.py: tuples, their inputs, processes, resuming."""
