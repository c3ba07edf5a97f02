"""What a run took, beside its plan: values, texts and charts."""
