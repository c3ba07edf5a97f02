"""What is asked for, what is allowed, where everything is to live, and how long it takes. Imports no torch."""
