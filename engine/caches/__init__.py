"""What is kept on the disk between runs: encoded prompts, and weights in another format."""
