"""The exact image VAE: one frame, no feature cache, tiles that equal the untiled image."""
