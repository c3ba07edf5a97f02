"""Makes the bundled workflows: what they share stands here once, and the JSON files in workflows/ are what ships."""
