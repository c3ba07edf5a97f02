"""ComfyUI's MODEL, CLIP and VAE over our engine, its switches, and the values it sends. Knows no node of ours."""
