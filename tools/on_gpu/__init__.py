"""What `python dev.py gpu` measures. `devtools/gpu.py` is the command; jobs run in processes of their own."""
