"""A whole image: encode, sample, decode."""
