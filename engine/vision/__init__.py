"""Pictures in prompts: sizes, patches, and the vision tower block by block."""
