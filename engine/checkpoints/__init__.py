"""Index the tensors of model files: where each lies, of which dtype and shape. Reads headers only."""
