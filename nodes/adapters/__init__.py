"""ComfyUI's MODEL, CLIP and VAE over our engine: what its native nodes hold and call. Knows no node of ours."""
