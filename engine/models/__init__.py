"""What each network is: its tensors, configuration, blocks, costs, positions, latents and prompts."""
