"""The transformer: blocks in a store, the table of modulation, latents, schedule and guidance."""
