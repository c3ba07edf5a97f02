"""What a checkpoint is: member of the family, configuration, names of its tensors. Never touches weights."""
